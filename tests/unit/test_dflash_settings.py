"""What a DFlash configuration means for a target, and every configuration that cannot work."""

import pytest

from paceline.config.drafts import DFlashConfig, Eagle3Config
from paceline.drafts.dflash.algorithm import DFlash
from paceline.drafts.dflash.settings import derive_settings
from paceline.drafts.layers_spec import check_layers, even_layers
from paceline.errors import ConfigError
from rows import make_context, tiny_info


def test_published_layers_of_a_36_layer_target_are_the_default():
    assert DFlash.feature_spec(DFlashConfig(), tiny_info(num_layers=36)).layers == (1, 9, 17, 25, 33)
    assert DFlash.feature_spec(DFlashConfig(num_layers=1), tiny_info(num_layers=36)).layers == (18,)


def test_a_default_that_would_repeat_a_layer_is_spread_evenly_instead():
    assert DFlash.feature_spec(DFlashConfig(), tiny_info(num_layers=8)).layers == (1, 2, 3, 4, 5)
    assert DFlash.feature_spec(DFlashConfig(), tiny_info(num_layers=7)).layers == (0, 1, 2, 4, 5)
    assert DFlash.feature_spec(DFlashConfig(), tiny_info(num_layers=4)).layers == (0, 1, 2)
    assert DFlash.feature_spec(DFlashConfig(num_layers=1), tiny_info(num_layers=2)).layers == (0,)


def test_even_spacing_includes_both_ends_and_one_is_the_middle():
    # A target of 16 layers has 15 eligible ones: the last cannot be captured.
    assert even_layers(16, 5) == (0, 4, 7, 10, 14)
    assert even_layers(6, 2) == (0, 4)
    assert even_layers(16, 1) == (7,)
    for num_layers in range(2, 60):
        for count in range(1, 12):
            layers = even_layers(num_layers, count)
            assert len(set(layers)) == len(layers) == min(count, num_layers - 1)
            assert count == 1 or len(layers) == 1 or (layers[0], layers[-1]) == (0, num_layers - 2)


def test_only_evaluation_asks_for_greedy_tokens():
    training = DFlash.feature_spec(DFlashConfig(), tiny_info())
    evaluation = DFlash.feature_spec(DFlashConfig(), tiny_info(), evaluation=True)
    assert (training.greedy, training.final_hidden, training.logsumexp) == (False, "none", False)
    assert (evaluation.greedy, evaluation.final_hidden) == (True, "none")


def test_gamma_follows_the_block_size():
    def weight(**changes) -> float:
        return derive_settings(DFlashConfig(**changes), tiny_info()).slot_weights[2]

    assert weight() == pytest.approx(0.866878)  # exp(-1/7)
    assert weight(block_size=10) == pytest.approx(0.818731)  # exp(-1/5)
    assert weight(block_size=8) == pytest.approx(0.778801)  # exp(-1/4)
    assert weight(block_size=4) == pytest.approx(0.564718)  # exp(-1/1.75)
    assert weight(loss_gamma=2.0) == pytest.approx(0.606531)


def test_sizes_come_from_the_target_unless_set():
    moe = derive_settings(DFlashConfig(), tiny_info(intermediate_size=None)).sizes
    assert (moe.intermediate_size, moe.num_heads, moe.num_kv_heads, moe.head_dim) == (96, 4, 2, 8)
    own = derive_settings(DFlashConfig(intermediate_size=40, num_heads=6, num_kv_heads=3, head_dim=4), tiny_info())
    sizes = own.sizes
    assert (sizes.intermediate_size, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim) == (40, 6, 3, 4)


SLIDING = ("sliding_attention", "full_attention")


@pytest.mark.parametrize(
    ("config", "facts", "words"),
    [
        ({"target_layers": (1, 9)}, {}, ["[1, 9]", "8 layers", "0..6"]),
        ({"target_layers": (-1, 3)}, {}, ["[-1, 3]", "0..6"]),
        ({"target_layers": (1, 7)}, {}, ["holds 7", "last", "0..6"]),
        ({"target_layers": (3, 1)}, {}, ["[3, 1]", "ascending"]),
        ({"target_layers": (1, 1)}, {}, ["[1, 1]", "repeats"]),
        ({"target_layers": ()}, {}, ["at least 1"]),
        ({}, {"num_layers": 1}, ["1 decoder layer"]),
        ({"num_heads": 5}, {}, ["5", "num_kv_heads = 2"]),
        ({"head_dim": 7}, {}, ["head_dim = 7", "8"]),
        ({"num_layers": 2, "layer_types": SLIDING}, {}, ["sliding_window is not set"]),
        ({"num_layers": 3, "layer_types": SLIDING, "sliding_window": 4}, {}, ["2 entries", "num_layers = 3"]),
        ({"sliding_window": 4}, {}, ["sliding_window = 4", "no sliding layer"]),
        ({}, {"mask_token_id": None}, ["64 rows", "60 tokens", "set mask_token_id"]),
        ({"mask_token_id": 64}, {}, ["mask_token_id = 64", "the target has 64"]),
        ({"mask_token_id": 59}, {}, ["mask_token_id = 59", "below 60", "from 60 to 63"]),
    ],
)
def test_a_configuration_that_cannot_work_names_both_values_and_the_remedy(config, facts, words):
    with pytest.raises(ConfigError) as raised:
        DFlash.feature_spec(DFlashConfig(**config), tiny_info(**facts))
    for word in words:
        assert word in str(raised.value)


def test_the_tokenizers_own_mask_token_and_unused_rows_are_allowed():
    assert derive_settings(DFlashConfig(mask_token_id=3), tiny_info(mask_token_id=3)).mask_token_id == 3
    assert derive_settings(DFlashConfig(mask_token_id=63), tiny_info()).mask_token_id == 63
    assert derive_settings(DFlashConfig(), tiny_info()).mask_token_id == 60


def test_an_algorithm_can_ask_for_more_than_one_layer():
    check_layers((1, 2), tiny_info(), at_least=2)
    with pytest.raises(ConfigError, match=r"names 1 layer.*at least 2"):
        check_layers((1,), tiny_info(), at_least=2)


def test_another_algorithms_configuration_is_refused():
    with pytest.raises(ConfigError, match="Eagle3Config"):
        DFlash(Eagle3Config(), make_context(tiny_info()))
