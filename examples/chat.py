"""A conversation at the terminal: chat.py m.mansard [most tokens of an answer]

    pip install ./python && python examples/chat.py smollm2.mansard
"""

import sys

import mansard


def main() -> int:
    if len(sys.argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    most = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    try:
        with mansard.Model(sys.argv[1]) as model:
            turns = []
            for line in sys.stdin:
                turns.append({"role": "user", "content": line.strip()})
                said = ""
                with model.chat(turns, max_tokens=most) as answer:
                    for piece in answer:
                        print(piece, end="", flush=True)
                        said += piece
                print()
                turns.append({"role": "assistant", "content": said})
    except mansard.MansardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
