"""The Unsloth back end on the branch of Unsloth that runs without a GPU: a run of ours through the real package."""

from __future__ import annotations

from unsloth_parts import needs_unsloth, play


@needs_unsloth
def test_a_run_in_4_bits_learns_saves_and_loads_again(tmp_path):
    play("a_run", tmp_path)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "compiled"}  # nothing is left in the user's folder
