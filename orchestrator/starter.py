"""The run file that ``headway init`` writes: every field, with its default or an example, and what it means."""

from __future__ import annotations

STARTER = """\
apiVersion: headway/v1          # the version of this file's format
name: my-model                  # a-z, 0-9 and dashes, at most 31 characters; the run is called name-<digest>
task: causal-lm                 # or sequence-classification, or module:Class in your working directory

model:                          # give exactly one of architecture and pretrained
  architecture:                 # any transformers architecture, trained from scratch, in the words of its config
    model_type: llama
    hidden_size: 256
    intermediate_size: 688
    num_hidden_layers: 4
    num_attention_heads: 4
  # init_from: RUN-ID@STEP      # start from the weights of another run's checkpoint
  # pretrained: s3://bucket/model  # or a model to fine-tune: a path, s3://, hf://org/name@COMMIT, or a GGUF file
  # trust_remote_code: false    # true runs Python code that lies beside the pretrained weights
  # lora:                       # train adapters beside the pretrained weights, which stay as they are
  #   rank: 16                  # inner size of an adapter's two matrices
  #   alpha: 32.0               # an adapter's output is multiplied by alpha / rank
  #   dropout: 0.0              # of an adapter's input
  #   target_modules: all-linear  # or last parts of the modules' names, such as [q_proj, v_proj]

data:                           # give exactly one of train and dataset
  train: "data/**/*.txt"        # a glob of local files, or s3://bucket/prefix/**/*.txt
  # dataset: NAME               # or a dataset prepared before: NAME, or NAME@FINGERPRINT
  format: text                  # text, source for a tree of code, jsonl, parquet, or messages for conversations
  text_field: text              # jsonl and parquet: the field or column that holds the text
  # label_field: label          # the one that holds the text's class, for sequence-classification
  # long_samples: truncate      # what becomes of a conversation or a labelled text that is too long; or skip
  clean: true                   # texts lose control characters and carriage returns; empty ones are left out
  max_bad_records: 0.01         # share of the records, and of the files, that may be bad
  vocab_size: 4096              # of the tokenizer that is trained on the source, at least 258
  # tokenizer: tokenizer.json   # or take this one, a path or s3://bucket/key
  # end_of_text: "</s>"         # its token behind each document; one of the usual names unless it is named here
  eval_fraction: 0.05           # share of the source's files held out for evaluation
  sequence_length: 256          # tokens that the model sees in one sample

train:                          # give exactly one of steps and epochs
  steps: 200                    # optimizer steps
  # epochs: 1.0                 # or passes over the training data; parts of one are allowed
  global_batch_size: 32         # samples per optimizer step, over all workers
  micro_batch_size: 8           # the most samples that one worker computes at once; lower it to save memory
  optimizer:                    # AdamW
    learning_rate: 1.0e-3       # at its peak
    warmup_steps: 20            # steps over which it climbs there
    weight_decay: 0.1
    betas: [0.9, 0.95]          # decay of the two moments
    eps: 1.0e-8                 # added to the denominator
    schedule: cosine            # constant, linear or cosine after the warm-up
    min_learning_rate_ratio: 0.1  # where linear and cosine end, as a share of learning_rate
  max_grad_norm: 1.0            # gradients are clipped to this norm; null does not clip
  zero:                         # DeepSpeed ZeRO
    stage: 2                    # divided over the workers: 0 nothing, 1 optimizer, 2 gradients too, 3 parameters too
    offload: none               # cpu keeps the optimizer's state in host memory; needs a GPU
  precision: auto               # auto is bf16 where the device has it natively, else fp32; or fp32, bf16, fp16
  seed: 0                       # of the initial weights and of the order of samples
  # activation_checkpointing: false  # true computes activations again instead of keeping them: saves memory
  # evaluate:                   # look at the held-out data while training goes on
  #   every_steps: 50           # steps between looks
  #   max_samples: 256          # looks at the first so many; null takes all
  #   patience: null            # ends training after so many looks that did not better the best one
  #   min_improvement: 0.0      # nats by which a look has to better the best one
  # deepspeed: {}               # more of DeepSpeed's own settings, but for those that this file sets
  step_timeout: 600             # seconds without progress after which a worker is hung, and restarted

checkpoint:
  every_steps: 50               # steps between checkpoints
  keep: 3                       # newest checkpoints kept

resources:
  workers: {min: 1, max: 2}     # any number in between may train, as the cluster has room
  gpu: null                     # any, or a kind of GPU, one for each worker; null trains on CPUs
  cpus_per_worker: 1
  max_failures: 3               # times that the workers are restarted in one attempt
  pip: []                       # packages installed beside the cluster's own, such as "einops==0.8.1"

env: {}                         # variables of every process of the run, such as {NCCL_DEBUG: INFO}
secrets: []                     # names of Kubernetes Secrets whose keys become variables too; never values

export:                         # how the last checkpoint becomes Hugging Face files
  dtype: auto                   # auto is the precision of the training; or fp32, bf16, fp16
  max_shard_bytes: 2147483648   # bytes of tensors in one file
  # lora: merged                # merged writes the whole model, adapter the adapter's files alone

gate:                           # what a trained model must show before it is released
  max_loss: null                # nats per token on the held-out data; null sets no limit
  # min: {accuracy: 0.9}        # the least that other figures of the evaluation may be
  # max: {perplexity: 20.0}     # the most that they may be
  must_beat_serving: false      # true refuses a model that is no better than the one that serves
  max_eval_samples: null        # evaluate on the first so many samples; null takes all

release:                        # leave this part out to train without releasing
  model: my-model               # the name under which versions are numbered
  channel: production           # what the serving side follows
  canary: null                  # 0.1 gives it a tenth of the requests until it has proved itself; null gives it all

# notify:                       # a webhook that is told how the run ends, such as Slack's
#   webhook: https://chat.example.com/hooks/1  # where notices are posted to
#   # webhook_env: ALERTS_URL   # or the variable that holds the address, where that is a secret, as Slack's is
#   events: [done, refused, failed, rejected, stalled]
#   stalled_minutes: 30         # without a step, after which the run counts as stalled
"""
