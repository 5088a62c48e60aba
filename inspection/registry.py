"""Moved to `inspection.head_scores`."""

from inspection.head_scores import ANTECEDENT, ANTECEDENTS, SCORES, HeadScore, describe_antecedent, score_info

__all__ = ["ANTECEDENT", "ANTECEDENTS", "SCORES", "HeadScore", "describe_antecedent", "score_info"]
