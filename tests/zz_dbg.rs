//! temp
use mansard_ir::{sample, text};
#[test]
fn show() {
    for s in std::env::var("S").unwrap().split(',') {
        let m = sample::graph(s.parse().unwrap(), 40).unwrap();
        println!("{}", text::print_model(&m));
    }
}
