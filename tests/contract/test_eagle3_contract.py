"""What every draft algorithm must do, shown for EAGLE-3; packing, weights of zero and layout are in the unit tests."""

import torch
from transformers import AutoModelForCausalLM

from overfit import ModelWeights, acceptance_length, greedy_rows, pack
from paceline.config.drafts import Eagle3Config
from paceline.drafts.eagle3.algorithm import Eagle3
from rows import make_context, tiny_info


def test_it_overfits_eight_rows_of_the_targets_own_greedy_answers(tiny_target):
    model = AutoModelForCausalLM.from_pretrained(tiny_target).eval()
    info = tiny_info(
        num_layers=4,
        vocab_size=300,
        num_tokenizer_tokens=261,
        mask_token_id=261,
        rope={"theta": model.config.rope_parameters["rope_theta"]},
    )
    config = Eagle3Config(num_depths=3, vocab_size=0, intermediate_size=512)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100.0)  # the same answers, said with conviction: few near-ties
    algorithm = Eagle3(config, make_context(info, weights=ModelWeights(model)))
    rows = greedy_rows(model, Eagle3.feature_spec(config, info).layers, count=8, prompt=4, length=28)
    assert acceptance_length(algorithm, rows) < 2
    together = pack(rows)
    optimizer = torch.optim.Adam(algorithm.draft.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=220)
    for step in range(1, 221):
        terms = algorithm.loss(together)
        optimizer.zero_grad()
        (terms.total / terms.weight).backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0 and acceptance_length(algorithm, rows) == algorithm.num_drafted + 1:
            break
    assert acceptance_length(algorithm, rows) == algorithm.num_drafted + 1
