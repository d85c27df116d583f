# ppvision for CPUs, Linux x86-64. Not built by anyone yet.
#
#   docker build -t ppvision .
#   docker run --rm -v "$PWD/photos:/photos" ppvision \
#       predict --model_path segformer_pale_nano.digit_scenes --image_path /photos --save_dir /photos/found
FROM python:3.11-slim-bookworm

# libgomp1: Paddle's threads. procps: VisualDL asks for processes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 procps \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /ppvision
COPY . .
RUN bash scripts/setup.sh
ENV PATH=/ppvision/.venv/bin:$PATH
ENTRYPOINT ["ppvision"]
CMD ["doctor"]
