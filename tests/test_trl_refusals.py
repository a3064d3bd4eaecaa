"""The adapter over TRL: its settings, what it refuses and in which words, and TRL as an option."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import sysconfig
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from datasets import Dataset
from trl import GRPOConfig, TrlParser
from trl_parts import SYSTEM, rows, sample, tokenizer, trainer_of

from igrpo_lite.config import RolloutOptions
from igrpo_lite.errors import ConfigError
from igrpo_lite.trl import IGRPOConfig, IGRPOTrainer, with_draft

ROOT = Path(__file__).resolve().parents[1]
OWN = [field.name for field in fields(IGRPOConfig) if field.name not in {field.name for field in fields(GRPOConfig)}]


def test_settings_are_those_of_our_own_trainer_and_in_the_docs():
    page = (ROOT / "docs" / "trl.md").read_text(encoding="utf-8")
    hints = get_type_hints(IGRPOConfig)
    for name in OWN:
        assert f"| `{name}` |" in page
        if name in RolloutOptions.model_fields and name != "num_drafts":
            field = RolloutOptions.model_fields[name]
            assert get_args(hints[name]) == get_args(field.annotation)
            assert IGRPOConfig.__dataclass_fields__[name].default == field.default


def test_trls_parser_reads_flags_and_files(tmp_path):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "num_drafts": 6, "draft_selection": "random"}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    flags = ["--config", str(tmp_path / "run.yaml"), "--num_drafts", "5", "--num_generations", "4"]
    (args,) = TrlParser((IGRPOConfig,)).parse_args_and_config(flags)
    assert (args.num_drafts, args.num_generations, args.draft_selection) == (5, 4, "random")
    assert IGRPOConfig(str(tmp_path), num_generations=4, use_cpu=True).num_drafts == 4


def test_wrong_settings_are_named_at_once(tmp_path):
    wrong = {
        "num_drafts": 0,
        "draft_selection": "worse",
        "stage2_template": "{draft}",
        "per_device_train_batch_size": 3,
    }
    with pytest.raises(ConfigError) as caught:
        IGRPOConfig(str(tmp_path), use_cpu=True, num_generations=4, gradient_accumulation_steps=2, **wrong)
    assert len(caught.value.problems) == 4
    for words in ("num_drafts: 0", "draft_selection: 'worse'", "{question}", "3 x 2 steps per generation = 6"):
        assert words in str(caught.value)
    for mended in ({"per_device_train_batch_size": 2}, {"gradient_accumulation_steps": 4}):  # what the message says
        IGRPOConfig(str(tmp_path), **{"use_cpu": True, "num_generations": 4, "gradient_accumulation_steps": 2} | mended)


def test_our_rewards_are_not_taken_for_models_of_that_name(tmp_path):
    args = IGRPOConfig(str(tmp_path), use_cpu=True, num_generations=4)
    for given in ("judge", [lambda completions, **_: [0.0] * len(completions), "judge"]):
        with pytest.raises(ConfigError) as caught:
            IGRPOTrainer("no/such-model", given, args, Dataset.from_list(rows()))
        (told,) = caught.value.problems
        assert told.startswith("reward_funcs: judge is a reward of igrpo-lite's own runs, not TRL's; give a")


def test_what_trl_can_do_beyond_text_is_refused_before_a_model_loads(tmp_path):
    def refused(**arguments: Any) -> str:
        args = IGRPOConfig(str(tmp_path), use_cpu=True, num_generations=4, per_device_eval_batch_size=6)
        given = {"args": args, "train_dataset": Dataset.from_list(rows())} | arguments
        with pytest.raises(ConfigError) as caught:
            IGRPOTrainer("no/such-model", lambda completions, **_: [0.0] * len(completions), **given)
        return str(caught.value)

    told = refused(
        tools=[print],
        rollout_func=print,
        environment_factory=dict,
        train_dataset=Dataset.from_dict({"prompt": ["?"], "image": [1]}),
        eval_dataset={"own": Dataset.from_dict({"question": ["?"]})},
    )
    for words in (
        "tools: not",
        "rollout_func: not",
        "environment_factory: not",
        "column 'image'",
        "eval_dataset['own']",
    ):
        assert words in told
    assert "no column 'prompt' (there are: question)" in told
    assert "per_device_eval_batch_size 6" in told
    assert "row 0" in refused(train_dataset=Dataset.from_dict({"prompt": [[SYSTEM]]}))
    assert "IGRPOConfig" in refused(args=GRPOConfig(str(tmp_path), use_cpu=True))


def test_a_prompt_that_was_rendered_already_is_refused(tmp_path):
    text = tokenizer().apply_chat_template(rows()[0]["prompt"], tokenize=False, add_generation_prompt=True)
    with pytest.raises(ConfigError, match="chat template was applied already"):
        sample(trainer_of(tmp_path, [{"prompt": text, "answer": "1"}] * 4))


def test_a_draft_cannot_close_the_turn_it_is_put_in(tmp_path):
    trainer = trainer_of(tmp_path)
    pieces = [tokenizer().encode(text) for text in (" 3*9=27", "<|im_end|>", "<|im_", "end|>", " \\boxed{27}")]
    ids = tuple(token for piece in pieces for token in piece)
    assert tokenizer().decode(ids, skip_special_tokens=True).count("<|im_end|>") == 1  # spelt out
    assert trainer._shown(ids) == "3*9=27 \\boxed{27}"


def test_rows_that_are_not_whole_groups_are_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.model.train()
    a, b = rows(count=2)
    for batch in ([a, b, b, a], [a, a, b]):
        with pytest.raises(ConfigError, match="whole groups of 2"):
            trainer._generate_and_score_completions(batch)
    assert trainer.calls == []


def test_the_draft_goes_into_the_last_user_message():
    turns = [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for content, filled in (
        ("c{d}", "c{d}|{e}"),
        ([{"type": "text", "text": "c"}], [{"type": "text", "text": "c|{e}"}]),
    ):
        prompt = [*turns, {"role": "user", "content": content, "name": "x"}]
        kept = copy.deepcopy(prompt)
        made = with_draft(prompt, "{e}", "{question}|{draft}")
        assert made == [*turns, {"role": "user", "content": filled, "name": "x"}]
        assert prompt == kept
    with pytest.raises(ConfigError, match="images"):
        with_draft([{"role": "user", "content": [{"type": "image"}]}], "", "{question}{draft}")


def run_python(code: str, *places: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.path[:0] = {[str(place) for place in places]}; {code}"
    command = [sys.executable, *options.pop("flags", ()), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.parametrize("installed", [None, "1.13.2", "1.17.0.dev0", "2.0.0"])
def test_another_trl_or_none_is_told_at_import(tmp_path, installed):
    site = Path(sysconfig.get_path("purelib"))
    for place in site.iterdir():
        if not place.name.startswith("trl"):
            (tmp_path / place.name).symlink_to(place)
    if installed:
        folder = tmp_path / f"trl-{installed}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {installed}\n")
    done = run_python("import igrpo_lite.trl", ROOT, tmp_path, flags=["-I", "-S"])
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert "TRLImportError: igrpo_lite.trl needs trl>=1.14,<1.17" in last
    assert (f"trl {installed} is installed" if installed else "trl is not installed") in last
    assert "pip install 'igrpo-lite[trl]'" in last
    caught = "\ntry: import igrpo_lite.trl\nexcept ImportError: print('torch' in sys.modules)"
    assert run_python(caught, ROOT, tmp_path, flags=["-I", "-S"]).stdout == "False\n"


def test_the_package_does_not_need_trl():
    code = "import igrpo_lite, igrpo_lite.cli, igrpo_lite.training.loop; print('trl' in sys.modules)"
    assert run_python(code, ROOT).stdout == "False\n"
