#!/bin/sh
# A stand-in for the base image python:3.11-slim-bookworm, made of Debian's packages where no image registry can be
# reached: tools/base-image.sh [IMAGE]. Needs debootstrap and root. The machine's own trust (CA bundle, pip.conf) goes into
# the stand-in, so that the Dockerfiles need to know nothing of it.
set -eu
image=${1:-python:3.11-slim-bookworm}
docker=${DOCKER:-docker}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip,tzdata bookworm "$root" >&2
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/doc/* "$root"/usr/share/man/* \
    "$root"/usr/lib/python3.11/EXTERNALLY-MANAGED
for name in python python3; do ln -sf /usr/bin/python3 "$root/usr/local/bin/$name"; done
ln -sf /usr/bin/pip3 "$root/usr/local/bin/pip"
if [ -s /etc/ssl/certs/ca-certificates.crt ]; then cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"; fi
printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' > "$root/etc/pip.conf"
tar -C "$root" -c . | $docker import --change 'CMD ["python3"]' --change 'ENV LANG=C.UTF-8' - "$image" >&2
