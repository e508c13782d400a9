use mansard_runtime::*;
fn main() {
    let m = Model::open(std::env::args().nth(1).unwrap()).unwrap();
    let t: usize = std::env::args().nth(2).unwrap().parse().unwrap();
    let mut e = m.engine(&EngineOptions { threads: Some(t), ..Default::default() }).unwrap();
    let s = e.new_sequence();
    let p: Vec<u32> = (0..512).map(|i| i * 7919 % 49000).collect();
    let mut pp = vec![]; let mut tg = vec![];
    for _ in 0..12 {
        e.truncate(s, 0).unwrap();
        let b = std::time::Instant::now();
        e.prefill(s, &p[..128]).unwrap();
        pp.push(128.0 / b.elapsed().as_secs_f64());
        e.truncate(s, 0).unwrap();
        let b = std::time::Instant::now();
        for i in 0..40 { e.step(&[Work { sequence: s, tokens: &p[i..i+1], rows: Rows::Last }]).unwrap(); }
        tg.push(40.0 / b.elapsed().as_secs_f64());
    }
    pp.sort_by(f64::total_cmp); tg.sort_by(f64::total_cmp);
    println!("t{t} pp med {:.0} best {:.0}  tg med {:.0} best {:.0}", pp[6], pp[11], tg[6], tg[11]);
}
