"""GPTModel for packs, and the one whose output step gives log-probabilities of labels instead of logits."""

from __future__ import annotations

from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from tulu_kernels.dispatch import Backend

from tulu_mega.model.logprobs import token_logprobs
from tulu_mega.model.rope import PlacedRotary


class PackedModel(GPTModel):
    """megatron-core's GPTModel with a rotary embedding for packs.

    Args:
        frequencies: `Ropes.frequencies`, on the model's device.
        The rest is GPTModel's.
    """

    def __init__(self, *args, frequencies: Tensor, **kwargs):
        super().__init__(*args, **kwargs)
        self.rotary_pos_emb = PlacedRotary(frequencies, self.config, self.pg_collection.cp)


class HiddenThrough(tensor_parallel.ColumnParallelLinear):
    """Output layer that holds the head's weight but hands hidden states on: the log-prob step multiplies, in chunks.

    Args:
        head: the output layer that GPTModel has built. Its weight, which GPTModel has marked by then, becomes this layer's;
            where the embedding serves as the head's weight there is none.
    """

    def __init__(self, head: tensor_parallel.ColumnParallelLinear):
        super().__init__(
            head.input_size,
            head.output_size,
            config=head.config,
            init_method=head.config.init_method,
            bias=False,
            gather_output=head.gather_output,
            skip_bias_add=head.skip_bias_add,
            skip_weight_param_allocation=True,
            embedding_activation_buffer=head.embedding_activation_buffer,
            grad_output_buffer=head.grad_output_buffer,
            tp_group=head.tp_group,
        )
        if head.weight is not None:
            self.weight = head.weight

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None, **_unused):
        """Return hidden states unchanged where GPTModel expects logits."""
        return input_, None


class PolicyModel(PackedModel):
    """megatron-core's GPTModel with the log-prob seam.

    ``forward(..., labels=labels)`` with labels [1, T] returns float32 log-probabilities [1, T] on the last pipeline stage,
    0 where the label is IGNORE; hidden states elsewhere. Without labels the last stage returns its final hidden states.

    Attributes may be set between forward passes: ``temperature``, which logits are divided by; ``gives_entropy``, with which a
    pair is returned: log-probabilities, and entropies [1, T] of the distributions that the labels are drawn from; ``labelled_N``,
    for the next pass alone, the positions of its labels that are not IGNORE: unless it is set, a GPU is asked for their number.

    Args:
        real_vocab_size: entries of the tokenizer's vocabulary; `vocab_size` is padded to divide over tensor ranks.
        kernels: what the log-prob step runs on, see `tulu_kernels.dispatch`.
        The rest is PackedModel's.
    """

    def __init__(self, *args, real_vocab_size: int, kernels: Backend = "auto", **kwargs):
        super().__init__(*args, **kwargs)
        self.kernels = kernels
        self.real_vocab_size = real_vocab_size
        self.temperature = 1.0
        self.gives_entropy = False
        self.labelled_N: Tensor | None = None
        if self.post_process:
            self.output_layer = HiddenThrough(self.output_layer)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Turn hidden states into log-probabilities. GPTModel calls this to turn logits into a loss.

        Args:
            labels: [1, T].
            logits: hidden states, [T, 1, H] or [T / TP, 1, H] under sequence parallelism.
        """
        labelled_N, self.labelled_N = self.labelled_N, None  # other labels have others
        logp_T, entropy_T = token_logprobs(
            logits,
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else self.output_layer.weight,
            labels[0],
            labelled_N=labelled_N,
            vocab_size=self.real_vocab_size,
            tensor_group=self.tp_group,
            sequence_parallel=self.config.sequence_parallel,
            temperature=self.temperature,
            entropy=self.gives_entropy,
            kernels=self.kernels,
        )
        return logp_T[None] if entropy_T is None else (logp_T[None], entropy_T[None])
