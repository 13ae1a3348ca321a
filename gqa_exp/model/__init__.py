from gqa_exp.model.convert import conversion_report, convert
from gqa_exp.model.generate import generate
from gqa_exp.model.inference import InferenceT5
from gqa_exp.model.t5 import T5, T5Config

__all__ = ["T5", "InferenceT5", "T5Config", "conversion_report", "convert", "generate"]
