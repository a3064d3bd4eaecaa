"""Public sets by name through ``datasets``, without network: from its cache as after a download, and from folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from real_data import real_data

SCRIPT = """
import json, sys
from pathlib import Path

import datasets
from datasets.naming import camelcase_to_snakecase

from igrpo_lite.config import DataOptions
from igrpo_lite.errors import DataError
from igrpo_lite.problems.hub import read_hub
from igrpo_lite.problems.loading import load_problems

work = Path(sys.argv[1])


def cache(repo, config, folder):
    '''What a download of ``repo`` leaves, made from the files of a folder.'''
    files = {path.stem: str(path) for path in folder.glob("*.jsonl")}
    built = next(iter(datasets.load_dataset("json", data_files=files).values()))
    made = Path(built.cache_files[0]["filename"]).parent
    owner, _, name = repo.partition("/")
    name = camelcase_to_snakecase(name)
    cached = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{name}" / config / "0.0.0" / "hash"
    cached.mkdir(parents=True)
    for file in made.iterdir():
        (cached / file.name.replace("json-", f"{name}-")).write_bytes(file.read_bytes())
    info = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(json.dumps({**info, "config_name": config, "dataset_name": name}))


def load(options):
    try:
        sets = load_problems(DataOptions(**options), 0)
    except DataError as error:
        return {"problems": error.problems}
    problems = [[[p.id, p.question, p.answer, sorted(p.columns)] for p in part] for part in (sets.train, sets.held_out)]
    overlap = sets.report.overlaps[0].count
    return {"train": problems[0], "held_out": problems[1], "lines": sets.report.lines(), "overlap": overlap}


def read(*arguments):
    try:
        table, split = read_hub(*arguments)
    except DataError as error:
        return {"problems": error.problems}
    return {"split": split, "rows": [row.values for row in table.rows], "where": [row.where for row in table.rows]}


datasets.disable_progress_bars()
cache("openai/gsm8k", "main", work / "gsm8k")
cache("open-r1/OpenR1-Math-220k", "default", work / "openr1")
runs = json.loads(sys.argv[2])
Path(sys.argv[3]).write_text(json.dumps([globals()[run[0]](*run[1:]) for run in runs]))
"""


def results(tmp_path: Path, *runs: list[Any]) -> list[Any]:
    """In a process of its own, because ``datasets`` reads its offline setting and its cache's place when imported."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_DATASETS_CACHE": str(tmp_path / "cache" / "datasets"),
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    out = tmp_path / "results.json"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(runs), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(out.read_text())
    return found


def test_public_sets_by_name(tmp_path: Path) -> None:
    folder, large = tmp_path / "gsm8k", tmp_path / "openr1"
    folder.mkdir(), large.mkdir()
    for split, count in (("train", 300), ("test", 40)):
        lines = real_data(f"gsm8k_{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    row = {
        "problem": "{}?",
        "answer": "{}",
        "generations": ["long"] * 4,
        "messages": [{"role": "user", "content": "x"}],
    }
    text = json.dumps(row)
    (large / "train.jsonl").write_text("\n".join(text.replace("{}", str(i)) for i in range(20_100)), encoding="utf-8")
    local = str(folder)
    named, tested, ranged, other, big, against, plain, whole, first, bad, none = results(
        tmp_path,
        ["load", {"data": "gsm8k"}],
        ["load", {"data": "GSM8K", "eval_data": "gsm8k", "decontaminate": ["gsm8k"]}],
        ["load", {"data": "openr1-math", "data_split": "train[:50]"}],
        ["load", {"eval_data": "openai/gsm8k", "max_problems": 20}],
        ["load", {"data": "openr1-math"}],
        ["load", {"data": "gsm8k", "decontaminate": ["openr1-math"]}],
        ["load", {"data": "svamp"}],
        ["read", local, None, None],
        ["read", local, None, "train", 7, ["answer"]],
        ["read", local, None, "dev", 7],
        ["read", local, None, "dev"],
    )
    gold = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    # By default rows of the training split are held out, never the test split.
    assert sorted(int(p[0].removeprefix("openai/gsm8k/train/")) for p in named["train"] + named["held_out"]) == list(
        range(300)
    )
    assert len(named["held_out"]) == 30
    for place, question, answer, columns in ([p[0].rpartition("/")[2], *p[1:]] for p in named["train"]):
        assert question == gold[int(place)]["question"].strip()
        assert answer == gold[int(place)]["answer"].rpartition("####")[2].strip().replace(",", "")
        assert columns == ["answer"]
    assert {p[0].rpartition("/")[0] for p in tested["held_out"]} == {"openai/gsm8k/test"}
    assert (len(tested["train"]), len(tested["held_out"]), tested["overlap"]) == (300, 40, 0)
    assert "no training problem is in openai/gsm8k/test" in tested["lines"]
    assert (len(ranged["train"]), len(ranged["held_out"])) == (45, 5)
    assert not any("only the first" in line for line in ranged["lines"])
    assert {p[0].rpartition("/")[0] for p in other["held_out"]} == {"openai/gsm8k/test"}
    assert len(big["train"]) + len(big["held_out"]) == 20_000
    assert big["train"][0][1:] == ["0?", "0", ["answer"]]  # neither the generations nor the messages
    assert (
        "  only the first 20,000 rows were read (--data-split 'train[:50000]' downloads all for more)" in big["lines"]
    )
    assert "no training problem is in the first 20,000 rows of open-r1/OpenR1-Math-220k/train" in against["lines"]
    assert plain["problems"] == [
        "ChilleD/SVAMP: not in the local cache, and HF_HUB_OFFLINE forbids the download; "
        "unset it, or give a local file (JSONL, JSON, CSV, parquet) as svamp=path"
    ]
    assert (whole["split"], len(whole["rows"])) == ("test", 40)
    assert [set(values) for values in first["rows"]] == [{"question"}] * 7
    assert first["where"][-1].endswith("gsm8k train, row 7")
    for refused in (bad, none):
        assert "there is no split dev" in refused["problems"][0]
        assert "choose with --data-split or --eval-split" in refused["problems"][0]
