from gqa_exp.evaluation.evaluate import Evaluation, evaluate_model
from gqa_exp.evaluation.metrics import Scores, bootstrap_interval, paired_bootstrap, primary, score

__all__ = ["Evaluation", "Scores", "bootstrap_interval", "evaluate_model", "paired_bootstrap", "primary", "score"]
