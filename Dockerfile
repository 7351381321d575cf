# latentprep and latenttrain on an official PyTorch CUDA runtime image; for CPUs only, without gigabytes of CUDA:
#   docker build --build-arg BASE=docker.io/library/python:3.11-slim -t latentprep:cpu .
# make image builds that and checks it. Layers that change seldom come first.
ARG BASE=docker.io/pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime

FROM ${BASE} AS dependencies
ARG EXTRAS=vae,s3,gcs,hub,tensorboard
# A base that brings torch keeps it. The others get the pinned one, from here since PyPI's brings CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /build
COPY pyproject.toml constraints.txt ./
# Empty packages stand in for ours. Not needed: tests (numpy.testing imports its own), and torch's C++ headers and programs.
# A read-only image cannot keep compiled modules, so what the programs import is compiled here, and the rest is not.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    if python3 -c "import torch" 2>/dev/null; then sed -i '/^torch==/d' constraints.txt; TORCH_INDEX=; fi \
    && mkdir latentprep latenttrain && touch README.md LICENSE latentprep/__init__.py latenttrain/__init__.py \
    && python3 -m venv --without-pip --system-site-packages /opt/venv \
    && python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --constraint constraints.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[${EXTRAS}]" \
    && python3 -m pip --python /opt/venv/bin/python uninstall --yes latentprep \
    && find /opt/venv \( -name tests -not -path "*/numpy/*" -o -path "*/torch/test" -o -path "*/torch/include" \
        -o -path "*/torch/bin/test_*" -o -path "*/torch/bin/protoc*" \) -prune -exec rm -r {} + \
    && for module in torch._dynamo torch.utils.tensorboard matplotlib.pyplot zarr obstore huggingface_hub \
        diffusers.models.autoencoders.autoencoder_kl diffusers.models.autoencoders.autoencoder_tiny; \
    do /opt/venv/bin/python -c "import $module" || echo "not among the extras: $module"; done

FROM dependencies AS wheel
COPY README.md LICENSE ./
COPY latentprep latentprep
COPY latenttrain latenttrain
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf python3 -m pip wheel --no-deps --wheel-dir /wheels .

FROM ${BASE}
LABEL org.opencontainers.image.title="latentprep" \
    org.opencontainers.image.description="Encode an image dataset once with a lossy codec, keep the low-bit codes, train small networks on them." \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="0.1.0"
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=wheel /wheels /wheels
RUN python3 -m pip --python /opt/venv/bin/python install --no-cache-dir --no-deps --no-index /wheels/*.whl \
    && mkdir /data && chown 1000:1000 /data
# Any user may run it: what would go to a home goes to the volume, and the name stands in for an entry in /etc/passwd.
ENV PATH=/opt/venv/bin:$PATH HOME=/data USER=latent
USER 1000
WORKDIR /data
CMD ["latentprep", "--help"]
