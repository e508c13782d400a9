#!/usr/bin/env python3
"""Plain PyTorch on the shapes of FOLDER/plan.json: what Mansard's speeds are put beside.

A Llama decoder in bf16 with a static cache, scaled_dot_product_attention and torch.compile(mode="max-autotune"), whose decoded
step is a CUDA graph; weights are random. JSON on standard output: rows of seconds, each the least of several, and the rate of
a product of 4096 x 4096 x 4096. `--device cpu` is for trying the script out.
"""
import argparse, json, os, sys, time

import torch
import torch.nn.functional as F


class Layer(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        linear = lambda k, n: torch.nn.Linear(k, n, bias=False)
        self.heads, self.kv, self.dim, self.eps = c["heads"], c["kv_heads"], c["head_dim"], 1e-5
        self.qkv = linear(c["hidden"], (self.heads + 2 * self.kv) * self.dim)
        self.out = linear(self.heads * self.dim, c["hidden"])
        self.up = linear(c["hidden"], 2 * c["intermediate"])
        self.down = linear(c["intermediate"], c["hidden"])
        self.norms = torch.nn.Parameter(torch.ones(2, c["hidden"]))

    def forward(self, x, cos, sin, keys, values, position, mask):
        b, t, h = x.shape
        q, k, v = self.qkv(F.rms_norm(x, (h,), self.norms[0], self.eps)).split(
            [self.heads * self.dim, self.kv * self.dim, self.kv * self.dim], -1)
        shape = lambda y, n: y.view(b, t, n, self.dim).transpose(1, 2)
        turn = lambda y: y * cos + torch.cat((-y[..., self.dim // 2:], y[..., :self.dim // 2]), -1) * sin
        q, k, v = turn(shape(q, self.heads)), turn(shape(k, self.kv)), shape(v, self.kv)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        a = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, -1))
        gate, up = self.up(F.rms_norm(x, (h,), self.norms[1], self.eps)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Decoder(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed = torch.nn.Embedding(c["vocab"], c["hidden"])
        self.layers = torch.nn.ModuleList(Layer(c) for _ in range(c["layers"]))
        self.norm = torch.nn.Parameter(torch.ones(c["hidden"]))
        self.c = c

    def caches(self, batch, positions, device):
        shape = (self.c["layers"], 2, batch, self.c["kv_heads"], positions, self.c["head_dim"])
        return torch.zeros(shape, dtype=torch.bfloat16, device=device)

    def forward(self, tokens, position, caches, cos, sin):
        x = self.embed(tokens)
        mask = torch.arange(caches.shape[4], device=tokens.device)[None, :] <= position[:, None]
        for layer, (keys, values) in zip(self.layers, caches):
            x = layer(x, cos[position], sin[position], keys, values, position, mask)
        x = F.rms_norm(x[:, -1], (x.shape[-1],), self.norm, 1e-5)
        return F.linear(x, self.embed.weight).argmax(-1)


def least(f, device, times):
    """The least seconds of a call, after three to warm up."""
    best = float("inf")
    for i in range(times + 3):
        begin = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= 3:
            best = min(best, time.perf_counter() - begin)
    return best


def rows_of(speed, device, times):
    c = speed["shape"]
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(c).to(torch.bfloat16).eval()
    positions = speed["context"] + speed["decode"] + 8
    longest = max([positions] + speed["prefill"])
    angles = torch.arange(longest)[:, None] * 500000.0 ** (-torch.arange(0, c["head_dim"], 2) / c["head_dim"])
    angles = torch.cat((angles, angles), -1)
    cos, sin = (f(angles).to(device=device, dtype=torch.bfloat16) for f in (torch.cos, torch.sin))
    mode = "max-autotune" if device == "cuda" else "default"
    step = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)
    for batch in speed["batches"]:
        caches = model.caches(batch, positions, device)
        tokens = torch.ones(batch, 1, dtype=torch.long, device=device)
        position = torch.tensor([speed["context"]], device=device)
        run = lambda: step(tokens, position, caches, cos, sin)
        yield {"batch": batch, "context": speed["context"], "seconds": least(run, device, times)}
    for count in speed["prefill"]:
        caches = model.caches(1, count, device)
        tokens = torch.ones(1, count, dtype=torch.long, device=device)
        position = torch.arange(count, device=device)
        run = lambda: step(tokens, position, caches, cos, sin)
        yield {"prefill": count, "seconds": least(run, device, times)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--times", type=int, default=20)
    arguments = parser.parse_args()
    with open(os.path.join(arguments.folder, "plan.json")) as file:
        speeds = json.load(file).get("speeds", [])
    report = {"torch": torch.__version__, "rows": [], "errors": []}
    try:
        if arguments.device == "cuda":
            report["device"] = torch.cuda.get_device_name()
            a, b = (torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda") for _ in "ab")
            report["product_flops"] = 2 * 4096**3 / least(lambda: a @ b, "cuda", 20)
        known = {}
        with torch.no_grad():
            for speed in speeds:
                # Torch has one format here: bf16. Other formats of a shape are put beside it.
                key = json.dumps([speed[k] for k in ("shape", "context", "batches", "prefill", "decode")])
                if key not in known:
                    known[key] = []
                    try:
                        for row in rows_of(speed, arguments.device, arguments.times):
                            known[key].append(row)
                    except Exception as error:  # the other shapes are still worth measuring
                        report["errors"].append(f"{speed['name']}: {error}"[:500])
                    torch.compiler.reset()
                    if arguments.device == "cuda":
                        torch.cuda.empty_cache()
                report["rows"] += [{"name": speed["name"], "format": "bf16", **row} for row in known[key]]
                print(f"{speed['name']}: {len(known[key])} rows", file=sys.stderr)
    finally:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
