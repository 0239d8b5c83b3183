"""vLLM's own server on a CPU, with the experts that it chose in its answers.

    python rollout.py HUB --vllm-command "python tests/vllm_cpu.py"

vLLM 0.32 tells experts from its second runner alone, which needs Triton. Its runner for CPUs makes
here the same four calls of vLLM's own connector; scheduler, store, request and answer are as they
are on a GPU.
"""

from types import SimpleNamespace

import numpy as np
from vllm.config import VllmConfig
from vllm.distributed.aux_output_connector.worker import get_aux_output_connector
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


def tell_experts(runner) -> None:
    """Engine processes import the main module again, so each has this."""
    VllmConfig._verify_aux_output_compatibility = accept  # it asks for the second runner
    initialize, execute, sample = (
        getattr(runner, name) for name in ("initialize_kv_cache", "execute_model", "sample_tokens")
    )

    def initialize_kv_cache(self, kv_cache_config, *args, **kwargs):
        initialize(self, kv_cache_config, *args, **kwargs)
        on = self.vllm_config.aux_output_config.enabled
        found = on and get_aux_output_connector(self.model, self.vllm_config, kv_cache_config)
        self.connector, self.pending = found, None

    def execute_model(self, scheduler_output, *args, **kwargs):
        self.pending = None
        if self.connector:
            self.connector.begin_step(scheduler_output.aux_output_connector_metadata)
        output = execute(self, scheduler_output, *args, **kwargs)
        if self.connector and output is None:  # tokens are still to be sampled
            batch, n = self.input_batch, self.input_batch.num_reqs
            step = SimpleNamespace(
                req_ids=batch.req_ids[:n],
                query_start_loc_np=self.query_start_loc.np[: n + 1].copy(),
                num_computed_tokens_np=batch.num_computed_tokens_cpu[:n].copy(),
            )
            self.pending = self.connector.prepare_output(step)
        return output

    def sample_tokens(self, *args, **kwargs):
        output = sample(self, *args, **kwargs)
        if self.pending:
            places = [output.req_id_to_index[id] for id in self.pending.request_ids]
            counts = np.array([len(output.sampled_token_ids[i]) for i in places])
            self.pending.enqueue_cpu_copy(counts, np.zeros(len(places), int))
            output.aux_output_connector_output = self.pending.process_output()
        return output

    runner.initialize_kv_cache = initialize_kv_cache
    runner.execute_model = execute_model
    runner.sample_tokens = sample_tokens


def accept(config) -> None:
    return None


tell_experts(CPUModelRunner)

if __name__ == "__main__":
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
