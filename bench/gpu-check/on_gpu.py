#!/usr/bin/env python3
"""Runs the check on the machine with the GPU: no network, no Rust, no LLVM; torch where it is there.

    on_gpu.py FOLDER            joins the parts that pack.py made, runs the checker, then torch on the same shapes;
                                JSON on standard output, also what is there when time runs out
    on_gpu.py --merge FOLDER    only puts FOLDER/checker.json and FOLDER/torch.json side by side
"""
import datetime, json, os, subprocess, sys, tarfile, time

LIMIT = 460  # seconds of both together


def merge(checker, torch):
    """Every figure of the checker that torch has, too, gets a ratio: how many times as fast as torch."""
    for speed in checker.get("speeds", []):
        rows = [row for row in torch.get("rows", []) if row["name"] == speed["name"]]
        for step in speed.get("decode", []):
            for row in rows:
                if row.get("batch") == step["batch"] and row.get("context") == step["context"]:
                    step["torch_ratio"] = row["seconds"] / step["seconds"]
        for prompt in speed.get("prefill", []):
            for row in rows:
                if row.get("prefill") == prompt["tokens"]:
                    prompt["torch_ratio"] = row["seconds"] / prompt["seconds"]
    return {"date": datetime.date.today().isoformat(), "checker": checker, "torch": torch}


def read(folder, name):
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {"error": f"there is no {name}"}
    with open(path) as file:
        text = file.read()
    try:
        return json.loads(text)
    except ValueError as error:
        return {"error": f"{name}: {error}", "text": text[-2000:]}


def join(folder):
    """part-0, part-1, ... of one archive."""
    parts = sorted(p for p in os.listdir(folder) if p.startswith("part-"))
    if not parts:
        return
    archive = os.path.join(folder, "joined.tar")
    with open(archive, "wb") as out:
        for part in parts:
            with open(os.path.join(folder, part), "rb") as file:
                out.write(file.read())
    with tarfile.open(archive) as tar:
        tar.extractall(folder)
    os.remove(archive)


def run(command, folder, name, seconds):
    """What a command prints goes to a file, also where it is ended for want of time."""
    with open(os.path.join(folder, name), "w") as out:
        try:
            code = subprocess.run(command, stdout=out, timeout=max(seconds, 1)).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        except OSError as error:
            code = str(error)
    print(f"{command[0]}: {code}", file=sys.stderr)


def main():
    if sys.argv[1:2] == ["--merge"]:
        folder = sys.argv[2]
    else:
        folder, begin = sys.argv[1], time.time()
        join(folder)
        checker = os.path.join(folder, "mansard-gpu-check")
        os.chmod(checker, 0o755)
        run([checker, folder], folder, "checker.json", LIMIT * 0.5)
        torch = os.path.join(os.path.dirname(os.path.abspath(__file__)), "torch_loop.py")
        run([sys.executable, torch, folder], folder, "torch.json", LIMIT - (time.time() - begin))
    print(json.dumps(merge(read(folder, "checker.json"), read(folder, "torch.json")), indent=1))


if __name__ == "__main__":
    main()
