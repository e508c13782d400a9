#!/usr/bin/env python3
"""MiniLM as an ONNX graph in another engine: one JSON object of milliseconds a call, median.

usage: encoder_speed.py onnxruntime|openvino|iree MODEL.onnx BATCH TOKENS [--threads 2] [--bf16] [--reps 20]
       encoder_speed.py onnx MODEL_FOLDER OUT.onnx BATCH TOKENS         writes that graph, of fixed shape

The graph is the checkpoint's encoder with mean pooling: ids, mask -> embedding.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile, time

import numpy as np


def write_graph(folder, out, batch, tokens):
    from onnx import TensorProto, checker, helper, numpy_helper, save
    from safetensors.numpy import load_file

    with open(f"{folder}/config.json") as f:
        config = json.load(f)
    tensors = load_file(f"{folder}/model.safetensors")
    hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config["layer_norm_eps"]
    nodes, constants = [], {}

    def constant(name, value):
        constants.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(kind, *inputs, **attributes):
        nodes.append(helper.make_node(kind, list(inputs), [f"v{len(nodes)}"], **attributes))
        return f"v{len(nodes) - 1}"

    def shape(name, *extents):
        return constant(name, np.array(extents, np.int64))

    def dense(x, at):
        product = node("MatMul", x, constant(f"{at}.weight", tensors[f"{at}.weight"].T))
        return node("Add", product, constant(f"{at}.bias", tensors[f"{at}.bias"]))

    def norm(x, at):
        gain, bias = (constant(f"{at}.{part}", tensors[f"{at}.{part}"]) for part in ("weight", "bias"))
        return node("LayerNormalization", x, gain, bias, axis=-1, epsilon=eps)

    table = lambda part: tensors[f"embeddings.{part}_embeddings.weight"]
    x = node("Gather", constant("words", table("word")), "ids")
    x = norm(node("Add", x, constant("places", table("position")[:tokens] + table("token_type")[0])), "embeddings.LayerNorm")
    seen = node("Cast", "mask", to=TensorProto.FLOAT)
    hide = node("Sub", node("Unsqueeze", seen, shape("axes12", 1, 2)), constant("one", np.float32(1)))
    hide = node("Mul", hide, constant("far", np.float32(1e9)))
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        split = shape("split", 0, 0, heads, hidden // heads)
        q, k, v = (node("Reshape", dense(x, f"{at}.attention.self.{w}"), split) for w in ("query", "key", "value"))
        q, k = node("Transpose", q, perm=[0, 2, 1, 3]), node("Transpose", k, perm=[0, 2, 3, 1])
        scores = node("Mul", node("MatMul", q, k), constant("scale", np.float32((hidden // heads) ** -0.5)))
        weights = node("Softmax", node("Add", scores, hide), axis=-1)
        mixed = node("Transpose", node("MatMul", weights, node("Transpose", v, perm=[0, 2, 1, 3])), perm=[0, 2, 1, 3])
        mixed = node("Reshape", mixed, shape("merge", 0, 0, hidden))
        x = norm(node("Add", dense(mixed, f"{at}.attention.output.dense"), x), f"{at}.attention.output.LayerNorm")
        inner = node("Gelu", dense(x, f"{at}.intermediate.dense"))
        x = norm(node("Add", dense(inner, f"{at}.output.dense"), x), f"{at}.output.LayerNorm")
    weight = node("Unsqueeze", seen, shape("axis2", 2))
    total = node("ReduceSum", node("Mul", x, weight), shape("axis1", 1), keepdims=0)
    mean = [total, node("ReduceSum", weight, shape("axis1", 1), keepdims=0)]
    nodes.append(helper.make_node("Div", mean, ["embedding"]))
    inputs = [helper.make_tensor_value_info(k, TensorProto.INT64, [batch, tokens]) for k in ("ids", "mask")]
    outputs = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [batch, hidden])]
    graph = helper.make_graph(nodes, "encoder", inputs, outputs, list(constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    checker.check_model(model)
    save(model, out)


def onnxruntime(a, ids, mask):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = a.threads
    session = ort.InferenceSession(a.model, options, providers=["CPUExecutionProvider"])
    return (lambda: session.run(None, {"ids": ids, "mask": mask})[0]), ort.__version__


def openvino(a, ids, mask):
    import openvino as ov

    hints = {"INFERENCE_NUM_THREADS": a.threads, "PERFORMANCE_HINT": "LATENCY"}
    hints["INFERENCE_PRECISION_HINT"] = "bf16" if a.bf16 else "f32"
    compiled = ov.Core().compile_model(a.model, "CPU", hints)
    request = compiled.create_infer_request()
    return (lambda: request.infer({"ids": ids, "mask": mask})[compiled.output(0)]), ov.__version__


def iree(a, ids, mask):
    from importlib.metadata import version

    import iree.runtime as rt

    tools = os.path.dirname(sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        mlir, module = f"{folder}/m.mlir", f"{folder}/m.vmfb"
        subprocess.run([f"{tools}/iree-import-onnx", a.model, "-o", mlir], check=True)
        flags = ["--iree-hal-target-device=local", "--iree-hal-local-target-device-backends=llvm-cpu",
                 "--iree-llvmcpu-target-cpu=host", "--iree-opt-level=O3", "--iree-llvmcpu-stack-allocation-limit=131072"]
        subprocess.run([f"{tools}/iree-compile", mlir, "-o", module, *flags], check=True)
        with open(module, "rb") as f:
            compiled = f.read()
    rt.flags.parse_flags(f"--task_topology_max_group_count={a.threads}")
    config = rt.Config("local-task")
    module = rt.VmModule.copy_buffer(config.vm_instance, compiled)
    context = rt.SystemContext(config=config)
    context.add_vm_module(module)
    function = context.modules[module.name]["encoder"]
    x, y = (rt.asdevicearray(config.device, t) for t in (ids, mask))
    return (lambda: np.asarray(function(x, y).to_host())), version("iree-base-compiler")


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("engine", choices=["onnxruntime", "openvino", "iree", "onnx"])
    ap.add_argument("model")
    ap.add_argument("rest", nargs="+")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--bf16", action="store_true")
    ap.add_argument("--reps", type=int, default=20)
    a = ap.parse_args()
    if a.engine == "onnx":
        out, batch, tokens = a.rest
        return write_graph(a.model, out, int(batch), int(tokens))
    batch, tokens = map(int, a.rest)
    ids = (np.arange(batch * tokens, dtype=np.int64) * 7919 % 28000 + 1000).reshape(batch, tokens)
    call, version = globals()[a.engine](a, ids, np.ones_like(ids))
    for _ in range(4):
        result = call()
    times = []
    for _ in range(a.reps):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    print(json.dumps({"engine": a.engine, "version": version, "batch": batch, "tokens": tokens, "bf16": a.bf16,
                      "milliseconds": round(statistics.median(times), 2), "check": [round(float(v), 4) for v in result[0, :4]]}))


main()
