"""Every setting with its type, default and meaning: the one place where defaults stand.

`conf/*.yaml` composes; these plain dataclasses check what was composed (see `config.check`). They are also the typed
arguments of the classes they configure, so that a plain Lightning user writes `DataConfig(meta=...)` without Hydra.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

Part = Literal["vision", "projector", "llm"]
AdaptedPart = Literal["vision", "llm"]
Quantization = Literal["nf4"]
Rows = Literal["conversations", "pairs"]
OverLength = Literal["reject", "truncate", "shrink"]
ImageLabels = Literal["keep", "auto"]
RepeatRule = Literal["random", "prefix"]
Resampling = Literal["size", "sqrt"]
Resize = Literal["exact", "fast"]
Gray16 = Literal["clip", "scale"]
Reduction = Literal["token", "sample", "square"]
Normaliser = Literal["step", "micro_batch", "micro_batch_local"]
PairNormaliser = Literal["step", "micro_batch"]
Reference = Literal["cached", "online", "adapter_off"]
ShiftUpdate = Literal["micro_batch", "pair", "step"]
Decay = Literal["matrices", "all"]
Schedule = Literal["cosine", "constant"]
PixelShuffle = Literal["v1", "v2"]
Entry = Literal["mlp_warmup", "vit_incremental"]
CarriedProjector = Literal["match", "new"]
Metric = Literal[
    "exact_match",
    "exact_match_ignore_case",
    "vqa_score",
    "anls",
    "relaxed_accuracy",
    "multiple_choice",
    "number_match",
    "box_accuracy",
]


def _unset_by_part() -> dict[Part, float | None]:
    return {"vision": None, "projector": None, "llm": None}


def _official_targets() -> dict[AdaptedPart, list[str] | None]:
    return {"vision": None, "llm": None}


class Strict:
    """Unknown keys and values of another type are errors, never converted."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}


@dataclass(kw_only=True)
class ModelConfig(Strict):
    """Which network: built from these shapes, or read from a folder.

    Attributes:
        name: shown in tables; also the name of the recipe that goes with it.
        path: folder of a checkpoint, the original's layout or transformers'; null builds from the shapes below.
        vision_path: takes the vision tower from this folder: an InternViT, or a whole checkpoint.
        projector_path: takes the projector from this file (a released `mlp1`) or whole checkpoint.
        language_model_path: takes the language model from this folder: one of its own, or a whole checkpoint.
        random_weights: allow a first stage that starts from neither `path` nor `init_from`.
        tokenizer: folder of tokenizer files; null takes those beside the weights.
        template: chat template (`ivl_lightning.data.templates`); null takes the checkpoint's own, else `internvl2_5`.
        vision: fields of transformers' `InternVLVisionConfig`.
        language_model: `model_type` of any AutoModel language model, and fields of its configuration class.
        downsample_ratio: pixel unshuffle; 0.5 makes four patches one token.
        ps_version: order of a tile's tokens: `v2` row by row, `v1` column by column (InternVL 1.1, 1.2); null takes the
            checkpoint's own, else v2.
        vision_feature_layer: layer of the tower whose features are used: -1 the last, -4 the fourth from the top (1.1);
            null takes the checkpoint's own, else -1.
        position_std: spread of the class token and positions of a tower with random weights; 1 is the original's.
        dtype: of the stored weights; the optimizer keeps the same.
        attention: `ivl_packed`, or a transformers implementation that honors `cu_seq_lens_*` (flash_attention_2).
        activation_checkpointing: recompute each block in backward.
    """

    name: str = "custom"
    path: str | None = None
    vision_path: str | None = None
    projector_path: str | None = None
    language_model_path: str | None = None
    random_weights: bool = False
    tokenizer: str | None = None
    template: str | None = None
    vision: dict[str, Any] = field(default_factory=dict)
    language_model: dict[str, Any] = field(default_factory=dict)
    downsample_ratio: float = 0.5
    ps_version: PixelShuffle | None = None
    vision_feature_layer: int | None = None
    position_std: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "ivl_packed"
    activation_checkpointing: bool = False


@dataclass(kw_only=True)
class StageConfig(Strict):
    """What a stage trains.

    Attributes:
        _target_: the LightningModule.
        name: the stage's name and its folder in the run.
        rows: what it learns from: conversations, or preference pairs.
        trainable: parts that get gradients; null takes the class's own choice (the paper's), or with LoRA its parts.
        trainable_vision_layers: only the last n layers of the vision tower train; null trains all of a trainable tower.
        drop_path_rate: stochastic depth of the last vision layer, rising linearly from 0 at the first.
        generation_tokens: most tokens of a generated answer in validation.
    """

    _target_: str
    name: str
    rows: Rows = "conversations"
    trainable: list[Part] | None = None
    trainable_vision_layers: int | None = None
    drop_path_rate: float = 0.0
    generation_tokens: int = 32


@dataclass(kw_only=True)
class PrepareConfig(Strict):
    """A function that makes the data before the first stage (the miniature draws its pictures).

    Attributes:
        _target_: the function, called once by the launching process.
        folder: where it writes.
        needs_weights: hand it the folder of the weights that the stage starts from, as `weights`.
        options: further arguments.
    """

    _target_: str
    folder: str
    needs_weights: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class DataConfig(Strict):
    """Data, packing and validation.

    Attributes:
        meta: official meta.json of the training data.
        prepare: makes the data first; null if it is there.
        val_meta: meta.json of the validation data; null holds back `val_rows` of the training data.
        val_rows: rows held back by a hash of their content, over all datasets; 0 for none.
        cache_dir: where measured rows are kept between runs.
        packs_per_step: packs of an optimizer step over all ranks (the global batch).
        batch_samples: conversations of an optimizer step, which `packs_per_step` packs share; null fills the packs.
        batch_pairs: preference pairs of an optimizer step; `packs_per_step` packs share them.
        augmentation_seed: of JPEG degradation and frames in preference training, the same in every epoch and run.
        generation_meta: meta.json of conversations that preference training answers in validation; null for none.
        max_tokens: tokens of a pack at most.
        max_pack_tiles: tiles of a pack at most.
        max_sample_tokens: tokens of one sample at most; null: `max_tokens`.
        over_length: a sample over a cap is rejected, truncated (official), or shrunk to fewer tiles.
        pool_size: samples the planner looks at when it fills a pack.
        tile_size: side of a tile in pixels; must equal the vision tower's.
        min_tiles: tiles of an image at least.
        max_tiles: tiles of an image in training, thumbnail not counted, where its dataset gives no `max_dynamic_patch`.
        val_max_tiles: the same in validation and generation, for every dataset.
        use_thumbnail: add the whole picture as a last tile when there are several.
        resize: `exact` is Pillow's bicubic filter as in the original; `fast` may differ by 2 of 255 levels.
        min_frames: frames of a video at least, drawn anew for each epoch.
        max_frames: frames of a video at most.
        frame_sampling: which frames, in training: `rand`, `middle`, or `fpsX` for X frames a second.
        image_labels: `auto` writes `Image-i: ` before the images of multi-image rows that lack it; `keep` is official.
        repeat_rule: `repeat_time` below 1 draws a fresh random subset each epoch, or the head of the file (official).
        resampling: share of a dataset in an epoch: by its rows times `repeat_time`, or by the square root of that.
        weights: dataset -> its share of an epoch's samples, in any unit; names all datasets, or null for `resampling`.
        exclude: exclusion list written by `ivl-audit drop=FILE`; its rows are left out and listed in the ledger.
        expected_rows: dataset -> rows its annotation must have, usable or not; names all datasets. null for no rule.
        allowed_schemes: URL schemes that media paths may use; others are refused.
        follow_symlinks: allow links that lead out of a dataset's root.
        max_pixels: pictures whose header announces more are refused before they are decoded.
        exif_transpose: turn pictures upright by their EXIF orientation; the original does not.
        gray16: 16-bit gray pictures are clipped at 255 (official) or scaled.
        retries: further tries to open or fetch a medium before its row is given up; stores are given seconds.
        reject_limit: share of rejected rows above which the run stops.
        index_workers: processes that measure rows; null takes one per core.
        num_workers: loader processes per rank.
        generation_rows: validation rows answered by generation; 0 for none, null for all.
        generation_batch: questions answered side by side.
    """

    meta: str
    prepare: PrepareConfig | None = None
    val_meta: str | None = None
    val_rows: int = 0
    cache_dir: str | None = None
    packs_per_step: int = 1
    batch_samples: int | None = None
    batch_pairs: int = 256
    augmentation_seed: int = 0
    generation_meta: str | None = None
    max_tokens: int = 16384
    max_pack_tiles: int = 48
    max_sample_tokens: int | None = None
    over_length: OverLength = "reject"
    pool_size: int = 64
    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    val_max_tiles: int = 12
    use_thumbnail: bool = True
    resize: Resize = "exact"
    min_frames: int = 8
    max_frames: int = 32
    frame_sampling: str = "rand"
    image_labels: ImageLabels = "keep"
    repeat_rule: RepeatRule = "random"
    resampling: Resampling = "size"
    weights: dict[str, float] | None = None
    exclude: str | None = None
    expected_rows: dict[str, int] | None = None
    allowed_schemes: list[str] = field(default_factory=list)
    follow_symlinks: bool = False
    max_pixels: int = 89_478_485
    exif_transpose: bool = False
    gray16: Gray16 = "clip"
    retries: int = 2
    reject_limit: float = 0.01
    index_workers: int | None = None
    num_workers: int = 2
    generation_rows: int | None = 64
    generation_batch: int = 16


@dataclass(kw_only=True)
class LossConfig(Strict):
    """The loss head.

    Attributes:
        _target_: the head: `NextTokenLoss`, or a subclass of your own (docs/extending.md).
        reduction: how labels of long and short answers are weighed.
        normaliser: `step` divides by the whole step's weights; `micro_batch` (official with all-gather) and
            `micro_batch_local` (official without) divide each micro-batch by its own.
        chunk_rows: supervised tokens whose logits exist at one time.
        options: further arguments of a head of your own; null for none.
    """

    _target_: str = "ivl_lightning.losses.next_token.NextTokenLoss"
    reduction: Reduction = "square"
    normaliser: Normaliser = "step"
    chunk_rows: int = 4096
    options: dict[str, Any] | None = None


@dataclass(kw_only=True)
class PreferenceConfig(Strict):
    """What the preference stage minimizes.

    Attributes:
        beta: reward per unit of log-probability ratio; the heads refer to it.
        parts: name -> `weight` and `head` (`_target_` and arguments of a head of `losses.preference`); null leaves one
            out.
        update: when the shift of the quality head moves; the head refers to it. `step`: with each optimizer step.
            `micro_batch` is official.
        normaliser: `step` takes means over the step's pairs, `micro_batch` (official) over those of each micro-batch;
            what is logged is the mean over the step.
        reference: `cached` log-probabilities of the reference model, computed once; `online` keeps it in memory and
            runs it beside the policy; `adapter_off` runs the policy once more without its LoRA adapters.
        max_reward: a reward beyond it, either way, stops the run.
        chunk_rows: supervised tokens whose logits exist at one time.
    """

    beta: float = 0.1
    parts: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    update: ShiftUpdate = "step"
    normaliser: PairNormaliser = "step"
    reference: Reference = "cached"
    max_reward: float = 100.0
    chunk_rows: int = 4096


@dataclass(kw_only=True)
class LoraSettings(Strict):
    """LoRA: low-rank adapters train in place of the weights of a part. Settings of `lora=none` add none.

    Attributes:
        parts: parts that get adapters (`vision`, `llm`); their own weights are frozen. [] is no LoRA.
        rank: of the adapters.
        alpha: the adapters' product is scaled by alpha / rank; null is 2 * rank, as in the original.
        dropout: on the adapters' input, in training.
        targets: part -> names of the linear layers that get adapters, such as [q_proj, v_proj]; null takes the official
            ones, or every linear layer of the blocks of a language model that has no official ones.
        quantize: `nf4` keeps the frozen linear layers of the language model's blocks in 4 bits (QLoRA).
    """

    parts: list[AdaptedPart] = field(default_factory=list)
    rank: int = 16
    alpha: int | None = None
    dropout: float = 0.05
    targets: dict[AdaptedPart, list[str] | None] = field(default_factory=_official_targets)
    quantize: Quantization | None = None


@dataclass(kw_only=True)
class OptimConfig(Strict):
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate.
        lr_by_part: peak learning rate of single parts; null takes `lr`.
        weight_decay: decoupled weight decay.
        weight_decay_by_part: weight decay of single parts; null takes `weight_decay`.
        decay: `matrices` leaves out norms, biases, layer scales and embeddings; `all` is official.
        vision_layer_decay: each vision layer below the last learns by this factor slower; 1 is off.
        betas: AdamW's.
        eps: AdamW's.
        schedule: after the warm-up.
        warmup_steps: steps of linear warm-up; null takes `warmup_ratio`.
        warmup_ratio: share of the run that warms up.
        min_lr_ratio: the cosine ends at this share of the peak.
    """

    lr: float = 4e-5
    lr_by_part: dict[Part, float | None] = field(default_factory=_unset_by_part)
    weight_decay: float = 0.01
    weight_decay_by_part: dict[Part, float | None] = field(default_factory=_unset_by_part)
    decay: Decay = "matrices"
    vision_layer_decay: float = 1.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    schedule: Schedule = "cosine"
    warmup_steps: int | None = None
    warmup_ratio: float = 0.03
    min_lr_ratio: float = 0.0


@dataclass(kw_only=True)
class EvalConfig(Strict):
    """How answers are scored in validation; docs/evaluation.md has the metrics.

    Attributes:
        metric: of datasets that name none in their entry of meta.json.
        metrics: dataset -> its metric, in the place of that of its entry; null for none.
        max_tiles: tile limits at which the answered rows are answered once more at the end of the stage, for a curve
            of score over tokens; null for none.
        probe_rows: rows of a fixed probe set that is answered again and again, for sample cards; 0 for none.
        probe_every_n_steps: steps between two of its answers besides validations; null answers it with validations
            only.
        probe_meta: meta.json of the probe set; null takes the first answered validation rows.
    """

    metric: Metric = "exact_match"
    metrics: dict[str, Metric] | None = None
    max_tiles: list[int] | None = None
    probe_rows: int = 12
    probe_every_n_steps: int | None = None
    probe_meta: str | None = None


@dataclass(kw_only=True)
class TrainerConfig(Strict):
    """How long and on what.

    Attributes:
        max_steps: optimizer steps; null runs `max_epochs`.
        max_epochs: passes over the data when `max_steps` is null.
        accelerator: `auto`, `cpu` or `cuda`.
        devices: processes per node, one accelerator each.
        num_nodes: machines.
        precision: Lightning's names; FSDP wants 32-true and casts by `strategy.param_dtype`. For bfloat16 throughout
            take `model.dtype`.
        gradient_clip_val: norm to which gradients are clipped; null is off.
        val_every_n_steps: validate in between; null validates only at the end of the stage.
        log_every_n_steps: steps between two rows of metrics.
        checkpoint_every_n_steps: steps between two checkpoints; null saves only the final weights.
        keep_checkpoints: checkpoints kept.
        async_checkpoints: write checkpoints while training goes on, which takes the memory of a copy on the CPU.
        progress_bar: show one.
        threads: CPU threads per process; null leaves torch's choice.
        deterministic: ask torch for deterministic algorithms.
    """

    max_steps: int | None = None
    max_epochs: int = 1
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    gradient_clip_val: float | None = 1.0
    val_every_n_steps: int | None = None
    log_every_n_steps: int = 1
    checkpoint_every_n_steps: int | None = 100
    keep_checkpoints: int = 3
    async_checkpoints: bool = False
    progress_bar: bool = True
    threads: int | None = None
    deterministic: bool = False


@dataclass(kw_only=True)
class StrategyConfig(Strict):
    """How ranks share the work.

    Attributes:
        name: `single` one process, `ddp` a copy per rank, `fsdp` FSDP2 (weights, gradients and optimizer sharded over
            all ranks), `hsdp` the same inside groups of ranks, of which each has a copy.
        param_dtype: dtype FSDP computes in; weights and optimizer stay float32.
        reshard_after_forward: free gathered weights between forward and backward.
        shard_size: ranks that share one copy of the weights under `hsdp`; null is `trainer.devices`, a node.
        sync_every_micro_batch: reduce gradients with each micro-batch, which saves the memory of whole gradients
            between them; false reduces them with the step's last one alone.
        compile_blocks: compile each transformer block.
        cpu_offload: keep shards of weights, gradients and optimizer state in the memory of the host.
        prefetch: transformer blocks gathered ahead of the one that runs, both ways; 0 leaves it to the library.
        timeout_minutes: a collective that takes longer ends the run.
    """

    name: Literal["single", "ddp", "fsdp", "hsdp"] = "single"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    reshard_after_forward: bool = True
    shard_size: int | None = None
    sync_every_micro_batch: bool = False
    compile_blocks: bool = False
    cpu_offload: bool = False
    prefetch: int = 0
    timeout_minutes: int = 30


@dataclass(kw_only=True)
class LauncherConfig(Strict):
    """Where the command runs: here, or as a job of Slurm; of a multirun each job.

    Attributes:
        name: `none` runs here, or on the ranks that torchrun or srun has started, jobs of a multirun one after the
            other; `local` is the same with jobs of a multirun side by side; `slurm` submits the command, or each job.
        jobs: jobs of a multirun that run side by side under `local`; null is as many as the GPUs allow, each with
            `trainer.devices` of them, or one where they run on the CPU.
        nodes: machines of the job; as many as `trainer.num_nodes`.
        tasks_per_node: processes on each of them; as many as `trainer.devices`.
        gpus_per_node: GPUs of each machine; 0 for none.
        cpus_per_task: cores of each process; null leaves Slurm's choice.
        time_minutes: limit of the job; a requeued one gets as much again.
        partition: of the cluster; null leaves Slurm's choice.
        account: that pays; null leaves Slurm's choice.
        qos: quality of service; null leaves Slurm's choice.
        constraint: features that the machines must have; null for any.
        setup: shell commands that come first in the job.
        signal_seconds: so long before the limit the run saves and stops. Slurm may begin up to a minute earlier.
        requeue: put a job that stopped so back into the queue.
        options: further options of sbatch, without their dashes; true for one without a value.
        folder: of the job's script and logs; null is `RUN/slurm`.
    """

    name: Literal["none", "local", "slurm"] = "none"
    jobs: int | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    time_minutes: int = 60
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: list[str] = field(default_factory=list)
    signal_seconds: int = 180
    requeue: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None


@dataclass(kw_only=True)
class ObjectiveConfig(Strict):
    """The score of a run, by which jobs of a multirun or of a sweep are compared.

    Attributes:
        metric: logged name; null takes the first that there is of val/score, val/exact_match, val/reward_accuracy and
            val/loss.
        goal: `maximize` or `minimize`; null minimizes what ends in `loss` and maximizes anything else.
        stage: whose last validation counts; null is the last stage.
    """

    metric: str | None = None
    goal: Literal["maximize", "minimize"] | None = None
    stage: str | None = None


@dataclass(kw_only=True)
class ScalingConfig(Strict):
    """Progressive scaling: the vision tower is one that was trained beside another language model.

    Attributes:
        donor: run folder, exported folder, checkpoint of either layout, or bare vision tower; null is none.
        entry: stage that gets the tower. `mlp_warmup` runs stage 1 and leaves stage 1.5 out (published scripts);
            `vit_incremental` leaves stage 1 out (one account of the method).
        projector: `match` brings the donor's projector too where the language models are equally wide, `new` never.
    """

    donor: str | None = None
    entry: Entry = "mlp_warmup"
    projector: CarriedProjector = "match"


@dataclass(kw_only=True)
class RecipeConfig(Strict):
    """A published (or chosen) chain of stages.

    Attributes:
        name: of the recipe.
        model: the model config it belongs to; null suits any.
        source: where its numbers come from.
        sources: stage name -> the same, of a stage whose numbers come from elsewhere.
        chosen: stage name -> settings of it that no source gives; they are those of the nearest member.
        gpus: stage name -> accelerators of the published run; shown, not used.
        donor: recipe whose run gives the vision tower (`scaling.donor`).
        on_request: stages that run only where `stages` or `scaling.entry` names them.
        sequels: folder -> overrides of a further run, made in `RUN/FOLDER` behind a finished chain; [] is none.
        stages: stage name -> settings of that stage, a mapping of the same tree as `train.yaml`.
    """

    name: str = "none"
    model: str | None = None
    source: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, list[str]] = field(default_factory=dict)
    gpus: dict[str, int] = field(default_factory=dict)
    donor: str | None = None
    on_request: list[str] = field(default_factory=list)
    sequels: dict[str, list[str]] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(kw_only=True)
class RunConfig(Strict):
    """A stage's whole configuration, as written to `RUN/NAME/config.yaml`.

    Attributes:
        seed: of weights, plan and augmentation.
        run_dir: folder of the run, the same on every rank.
        stages: stages to run, in order; null runs the recipe's.
        init_from: run folder or weights folder the first stage starts from.
        dry_run: print what each stage would do, and do nothing.
        replay: run one step of a stage again, without an update, and print what is in its batch: the number of finished
            steps before it; null trains.
        stage: what trains.
        model: the network.
        data: of this stage.
        stage_data: stage name -> meta.json of that stage, or settings that replace those of `data`.
        loss: the loss head of supervised stages.
        preference: the loss of the preference stage.
        lora: adapters that train in place of a part's weights.
        scaling: where the vision tower comes from.
        optim: optimizer and schedule.
        eval: how answers are scored in validation.
        trainer: length, devices, precision.
        strategy: how ranks share the work.
        callbacks: name -> `_target_` and arguments of a Lightning callback; null leaves one out.
        logger: name -> `_target_` and arguments of a Lightning logger; `logger=[csv,wandb]` takes several files of the
            group. `metrics.jsonl` is always written.
        launcher: where the command runs.
        objective: the score by which runs are compared.
        recipe: the chain this stage was taken from.
    """

    seed: int
    run_dir: str
    stage: StageConfig
    model: ModelConfig
    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    trainer: TrainerConfig
    strategy: StrategyConfig
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    stages: list[str | int | float] | None = None
    init_from: str | None = None
    dry_run: bool = False
    replay: int | None = None
    stage_data: dict[str, str | dict[str, Any] | None] = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    logger: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
