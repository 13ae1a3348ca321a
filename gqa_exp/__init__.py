"""gqa_exp: what converting multi-head attention to grouped-query attention gains in time and loses in quality."""
