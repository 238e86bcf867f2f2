"""A small corpus with everything that preparation has to deal with, for tests of its forms."""

import hashlib
import json
import random

from llm.data.config import DataConfig, SourceConfig


def story(seed: int, num_words: int = 40) -> str:
    rng = random.Random(seed)
    return " ".join(
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9)))
        for _ in range(num_words)
    )


def write_lines(path, rows, broken=()):
    """Write JSON lines, with broken lines after them."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n".join(broken))


def mixed_config(folder, **fields) -> DataConfig:
    """Two texts of five files and chats of two: equal documents within files, across files, sources
    and the two splits, near duplicates of held-out text, bad rows."""
    held_out = [story(i) for i in range(12)]
    for source, base in (("books", 100), ("web", 200)):
        (folder / source).mkdir(parents=True)
        for i in range(5):
            own = [story(base + 10 * i + j, 20 + 7 * j) for j in range(6)]
            common = [story(50 + i % 2), story(60), own[0], held_out[i]]
            near = [f"Of {source}: " + held_out[5 + i].upper() + " and so on"] if i < 2 else []
            rows = [{"text": text} for text in own + common + near]
            write_lines(folder / source / f"{i}.jsonl", rows, ['{"text": 5}'] if i % 2 else [])
    write_lines(folder / "held_out.jsonl", [{"text": text} for text in [*held_out, held_out[0]]])
    chats = [
        [{"role": "user", "content": story(i % 17, 8)},
         {"role": "assistant", "content": story(1000 + i % 17, 10)}]
        for i in range(40)
    ]  # fmt: skip
    refused = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    (folder / "chat").mkdir()
    for i, turns in enumerate((chats[:25], [*chats[25:], refused])):
        write_lines(folder / "chat" / f"{i}.jsonl", [{"messages": each} for each in turns])
    sources = {
        "books": SourceConfig(
            paths=(f"{folder}/books/*.jsonl",), validation_paths=(f"{folder}/held_out.jsonl",)
        ),
        "web": SourceConfig(paths=(f"{folder}/web/*.jsonl",), validation_fraction=0.2),
        "chat": SourceConfig(
            paths=(f"{folder}/chat/*.jsonl",), format="messages", validation_fraction=0.2
        ),
    }
    return DataConfig(sources=sources, length_tokens=64, max_overlap_fraction=1.0, **fields)


def digests(folder) -> dict[str, str]:
    """Return every prepared file below a folder with the hash of its content. The tokenizer's, for
    a Beam job's workers to read, is none."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "tokenizer.json"
    }
