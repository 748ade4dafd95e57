# A GPU machine's environment: docker build -t pipelines . && docker run --gpus all --shm-size 8g -v $PWD/runs:/work/runs pipelines recipes/demo.yaml
FROM nvidia/cuda:12.8.1-cudnn-runtime-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-venv python3-dev build-essential git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /work
COPY . .
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir '.[feedback,quantization,evaluate]'
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/work/.hf
ENTRYPOINT ["pipelines", "run"]
