"""Rewards: the built-in ones, a language model as judge, and users' own functions."""

from igrpo_lite.answers import Verdict, find_answer, gold_answer, same_answer, verdict

__all__ = ["Verdict", "find_answer", "gold_answer", "same_answer", "verdict"]
