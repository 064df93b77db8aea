"""Looking into local attention: who sees whom, with which bias, and what a trained model makes of it."""

from .figures import attention_figure, bias_table_figure, neighborhood_figure
from .geometry import bias_index_map, explain_text
from .weights import attention_inputs, attention_weights

__all__ = [
    "attention_figure",
    "attention_inputs",
    "attention_weights",
    "bias_index_map",
    "bias_table_figure",
    "explain_text",
    "neighborhood_figure",
]
