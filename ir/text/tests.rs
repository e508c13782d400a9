//! Round trips, the exact words of errors, and texts damaged at every byte.

use super::*;
use crate::plan::Limits;

/// A layer with what can appear in text: caches, weights, attributes of each kind, a routing.
const LAYER: &str = r#"graph @layer(%x: f32[t, 64], %tokens: i32[t], %keys: keys<f16>[c, 1, 32], %values: values<f32>[c, 1, 32], %step: step[s]) stage imported {
  %5 = weight "up.weight" : q4_1[64, 64]
  %6 = rms_normalize %x {eps = 1e-5}                     # f32[t, 64]
  %7 = quantize %6                                       # a8[t, 64]
  %8 = matmul %7, %5                                     # f32[t, 64]
  %9 = split_heads %8 {heads = 2}                        # f32[t, 2, 32]
  %10 = attend %9, %keys, %values, %step {causal = true, scale = 0.125, softcap = 0.0, window = 0} # f32[t, 2, 32]
  %11 = merge_heads %10                                  # f32[t, 64]
  %12 = route %11 {normalize = false, top = 2}           # routing[t, 2, 64]
  return x = %11, route = %12, same = %x
}
"#;

#[test]
fn prints_what_it_parses() {
    let model = parse("layer.mir", LAYER).unwrap();
    assert_eq!(print_graph(&model.graphs[0]), LAYER);
    assert_eq!(model.outputs, ["x", "route", "same"]);
}

#[test]
fn names_and_comments_are_free() {
    let text = "# a comment\ngraph @g(%x: f32[t, 4]) stage canonical when t = 1..8 { # here\n \
                %y = tanh %x : f32[t, 4] %7 = scale %y {by = 2} return \"odd name\" = %7 }";
    let model = parse("g", text).unwrap();
    let expected = "graph @g(%x: f32[t, 4]) stage canonical when t = 1..8 {\n  \
        %1 = tanh %x                                           # f32[t, 4]\n  \
        %2 = scale %1 {by = 2.0}                               # f32[t, 4]\n  \
        return \"odd name\" = %2\n}\n";
    assert_eq!(print_graph(&model.graphs[0]), expected);
    assert_eq!(print_graph(&parse("g", expected).unwrap().graphs[0]), expected);
}

#[test]
fn kernels_surround_their_nodes() {
    let text = "graph @g(%x: f32[t, 4]) stage optimized {\n  \
        %1 = weight \"w\" : f32[4, 4]\n  kernel {\n    \
        %2 = tanh %x                                         # f32[t, 4]\n    \
        %3 = weight \"v\" : f32[4, 4]\n    \
        %4 = matmul %2, %1                                   # f32[t, 4]\n  }\n  \
        %5 = weight \"u\" : f32[4, 4]\n  kernel {\n    \
        %6 = matmul %4, %3                                   # f32[t, 4]\n  }\n  kernel {\n    \
        %7 = matmul %6, %5                                   # f32[t, 4]\n  }\n  \
        return x = %7\n}\n";
    let model = parse("g", text).unwrap();
    let values: Vec<Vec<u32>> =
        model.graphs[0].kernels.iter().map(|k| k.values.iter().map(|v| v.0).collect()).collect();
    assert_eq!(values, [vec![2, 4], vec![6], vec![7]]);
    assert_eq!(print_graph(&model.graphs[0]), text);
}

#[test]
fn calls_are_counted() {
    let head = "graph @a(%x: f32[t, 4]) stage imported {\n  return x = %x\n}\n\n";
    let text = format!(
        "{head}model @\"odd \\\"name\\\"\" {{\n  info {{architecture = \"llama\", context = 64, vocab = 10, hidden = 4, \
         encoder = false, end_tokens = [1, 2]}}\n  call @a\n  call @a x 5 with \"layers.{{i}}.\"\n  \
         call @a with \"layers.07.\"\n  call @a x 3 from 9 with \"l2.{{i}}.x3.\"\n  call @a with \"l2.12.\"\n  output x\n}}\n"
    );
    let model = parse("m", &text).unwrap();
    assert_eq!(print_model(&model), text);
    assert_eq!(model.calls.len(), 11);
    assert_eq!(model.calls[5].prefix, "layers.4.");
    assert_eq!(model.calls[9].prefix, "l2.11.x3.");
    assert_eq!(model.info.end_tokens, [1, 2]);
}

#[test]
fn types_parse_as_they_print() {
    for text in
        ["f32[]", "f32[t, 576]", "q4_k[8, 256]", "a8[r, 64]", "keys<f16>[c, 3, 64]", "values<i8, window = 9>[c, 1, 8]"]
    {
        assert_eq!(parse_type(text).unwrap().to_string(), text);
    }
    for text in ["step[s]", "routing[t, 2, 8]", "i32[s]"] {
        assert_eq!(parse_type(text).unwrap().to_string(), text);
    }
    for text in [
        "keys<f16, window = 0>[c, 1, 8]",
        "keys<f16, window>[c, 1, 8]",
        "f32",
        "f32[t",
        "q4_k[8, 32]",
        "f32[0]",
        "f32[99999999, 99999999]",
        "keys<i32>[c, 3, 64]",
        "f32[t] x",
    ] {
        assert!(parse_type(text).is_err(), "{text}");
    }
}

/// Each wrong text and the whole message for it.
#[test]
fn errors_show_the_place() {
    let cases = [
        (
            "graph @g(%x: f32[t, 4] stage",
            "m:1:24: expected `,`, found `stage`\n  | graph @g(%x: f32[t, 4] stage\n  |                        ^",
        ),
        (
            "graph @g() stage canonical {\n  %1 = tahn %0\n",
            "m:2:8: expected an op of the op table, found `tahn`\n  |   %1 = tahn %0\n  |        ^",
        ),
        (
            "graph @g() stage canonical { %1 = tanh %0",
            "m:1:40: `%0` is not defined before this\n  | graph @g() stage canonical { %1 = tanh %0\n  |                                        ^",
        ),
        ("", "m:1:1: expected `graph`, or one `model`, found the end\n  | \n  | ^"),
        (
            "graph @g(%x: f32[t, 4], %x: step[s])",
            "m:1:25: `%x` is already defined\n  | graph @g(%x: f32[t, 4], %x: step[s])\n  |                         ^",
        ),
        ("graph \u{1b}", "m:1:7: expected a word or a mark, found '\\u{1b}'\n  | graph  \n  |       ^"),
        (
            "model @m { call @g x 2 }",
            "m:1:20: several calls need a prefix that counts, such as \"layers.{i}.\"\n  | model @m { call @g x 2 }\n  |                    ^",
        ),
        (
            "model @m { call @g x 99999999 with \"{i}\" }",
            "m:1:20: a model has at most 65536 calls, with prefixes of 256 bytes\n  | model @m { call @g x 99999999 with \"{i}\" }\n  |                    ^",
        ),
    ];
    for (text, message) in cases {
        assert_eq!(parse("m", text).unwrap_err().to_string(), message);
    }
    let ill_typed = "graph @g(%x: f32[t, 4]) stage canonical { %w = weight \"w\" : f32[3, 5] %y = matmul %x, %w";
    let message = parse("m", ill_typed).unwrap_err().to_string();
    assert!(message.starts_with("m:1:76: matmul(f32[t, 4], f32[3, 5]): columns do not agree\n"), "{message}");
}

/// Every prefix of a text, and the text with any one byte changed, gives an answer or an error.
#[test]
fn any_bytes_are_answered() {
    let text = format!("{LAYER}model @m {{ info {{hidden = 3}} call @layer x 2 with \"\\u{{41}}{{i}}.\" output x }}");
    assert!(parse("m", &text).is_ok());
    for i in 0..text.len() {
        _ = parse("m", &text[..i]);
        for byte in b"\0\"%@{}[(<-.9e\\#\n" {
            let mut bytes = text.clone().into_bytes();
            bytes[i] = *byte;
            if let Ok(model) = parse("m", &String::from_utf8_lossy(&bytes)) {
                let printed = print_model(&model);
                let again = parse("m", &printed).unwrap_or_else(|e| panic!("{e}\n{printed}"));
                assert_eq!(print_model(&again), printed);
            }
        }
    }
}

#[test]
fn programs_print() {
    let limits = Limits { tokens: 8, rows: 1, sequences: 1, context: 64, tile: 4 };
    let program = crate::plan::Program { limits, arena_bytes: 128, ..Default::default() };
    let expected =
        "program for 8 tokens, 1 rows, 1 sequences, context 64, attention tiles of 4 {\n  arena 128 bytes\n}\n";
    assert_eq!(print_program(&program), expected);
}
