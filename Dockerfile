# latentprep and latenttrain on an official PyTorch CUDA runtime image; for CPUs only:
#   docker build --build-arg BASE=python:3.11-slim -t latentprep:cpu .
ARG BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${BASE}

RUN useradd --create-home --uid 1000 latent && mkdir /data && chown latent /data
COPY --chown=latent pyproject.toml constraints.txt README.md LICENSE /opt/latentprep/
COPY --chown=latent latentprep /opt/latentprep/latentprep
COPY --chown=latent latenttrain /opt/latentprep/latenttrain
# A base that brings its own torch keeps it; the others get the pinned one.
RUN cd /opt/latentprep \
    && if python -c "import torch" 2>/dev/null; then sed -i '/^torch==/d' constraints.txt; fi \
    && pip install --no-cache-dir --constraint constraints.txt '.[vae,s3,gcs,hub,tensorboard]'

USER latent
WORKDIR /data
ENV LATENTPREP_CACHE=/data/.cache/latentprep HF_HOME=/data/.cache/huggingface
CMD ["latentprep", "--help"]
