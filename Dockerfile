# docker build -t lth_diet --build-arg GIT_COMMIT=$(git rev-parse HEAD) .
# mkdir -p data runs
# docker run --gpus all --shm-size=1g -v $PWD/data:/lth_diet/data -v $PWD/runs:/lth_diet/runs lth_diet -n 4 recipes/imp.py -f yamls/cifar100_all.yaml
#
# torch's wheels include CUDA. The host needs the NVIDIA driver and container toolkit; the image needs no other CUDA.
FROM python:3.11.13-slim-bookworm

# for compile=true: C on a GPU, C++ on a CPU; the base image has Python's headers
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

WORKDIR /lth_diet

# a separate layer, rebuilt only if the requirements change
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

COPY pyproject.toml README.md ./
COPY lth_diet lth_diet
COPY analysis analysis
RUN pip install --no-cache-dir --no-deps --no-build-isolation -e .
COPY recipes recipes
COPY yamls yamls

# data sets and cache; run directories and MLflow store; artifacts of the server in compose.yaml: writable for any user
RUN mkdir -m 777 data runs artifacts
VOLUME ["/lth_diet/data", "/lth_diet/runs"]

ARG GIT_COMMIT=unknown
ENV HOME=/tmp \
    USER=lth_diet \
    LTH_DIET_CACHE=/lth_diet/data/cache \
    LTH_DIET_COMMIT=$GIT_COMMIT \
    TORCHINDUCTOR_CACHE_DIR=/lth_diet/data/cache/compiled \
    MLFLOW_TRACKING_URI=sqlite:////lth_diet/runs/mlflow.db

USER 1000:1000
ENTRYPOINT ["composer"]
