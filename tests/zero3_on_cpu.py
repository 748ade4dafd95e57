"""`python -m pipelines` under ZeRO-3 that cuts up every weight, for `accelerate launch`.

DeepSpeed keeps weights of less than 1e5 numbers whole, which all those of the tests' models are.
"""

from deepspeed.runtime.zero import parameter_offload

from pipelines.__main__ import entry

if __name__ == "__main__":
    parameter_offload.DeepSpeedZeRoOffload.mark_persistent_parameters = lambda *_: []
    entry()
