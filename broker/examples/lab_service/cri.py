#!/usr/bin/python3
"""What the kubelet asks of a runtime, through CRI: a pod with one container, which has CDI devices.

cri.py run NAME IMAGE DEVICE [WORD...]    make and start a pod and its container
cri.py exec NAME WORD...                  run something in the container
cri.py restart NAME                       stop the container, remove it, make and start its successor
cri.py remove NAME                        end all of it

The messages are those of runtime/v1, as numbers of fields and their values.
"""

import json
import pathlib
import sys

import grpc

SOCKET = "unix:///run/containerd/containerd.sock"
STATE = pathlib.Path("/run/cri")
HOST_NETWORK = {1: 2}
# Seconds; an emulated machine takes its time.
PATIENCE = 300


def varint(number):
    data = bytearray()
    while number > 0x7F:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(data + bytes([number]))


def encode(message):
    data = b""
    for field, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, int):
                data += varint(field << 3) + varint(one)
                continue
            part = encode(one) if isinstance(one, dict) else one.encode()
            data += varint(field << 3 | 2) + varint(len(part)) + part
    return data


def decode(data):
    """The numbers and the bytes of a message, by field."""
    place = 0

    def number():
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    fields = {}
    while place < len(data):
        key = number()
        if key & 7 == 0:
            fields[key >> 3] = number()
        else:
            length = number()
            fields[key >> 3] = data[place : place + length]
            place += length
    return fields


class Runtime:
    def __init__(self):
        self.channel = grpc.insecure_channel(SOCKET)

    def __getattr__(self, method):
        call = self.channel.unary_unary(
            f"/runtime.v1.RuntimeService/{method}", request_serializer=encode, response_deserializer=decode
        )
        return lambda message: call(message, timeout=PATIENCE, wait_for_ready=True)


def pod_of(name):
    return {
        1: {1: name, 2: f"uid-{name}", 3: "default"},
        3: f"/var/log/pods/{name}",
        8: {2: {1: HOST_NETWORK}},
    }


def start(runtime, name, state):
    state["attempt"] += 1
    config = {
        1: {1: name, 2: state["attempt"]},
        2: {1: state["image"]},
        3: state["words"],
        11: "log",
        15: {2: {3: HOST_NETWORK}},
        17: [{1: state["device"]}],
    }
    made = runtime.CreateContainer({1: state["pod"], 2: config, 3: pod_of(name)})
    state["container"] = made[1].decode()
    (STATE / name).write_text(json.dumps(state))
    runtime.StartContainer({1: state["container"]})


def end(runtime, state):
    runtime.StopContainer({1: state["container"], 2: 0})
    runtime.RemoveContainer({1: state["container"]})


def main(do, name, *words):
    runtime = Runtime()
    if do == "run":
        image, device, *words = words
        pathlib.Path(f"/var/log/pods/{name}").mkdir(parents=True, exist_ok=True)
        STATE.mkdir(exist_ok=True)
        pod = runtime.RunPodSandbox({1: pod_of(name)})[1].decode()
        state = {"pod": pod, "image": image, "device": device, "words": words, "attempt": 0}
        (STATE / name).write_text(json.dumps(state))
        start(runtime, name, state)
        return 0
    state = json.loads((STATE / name).read_text())
    if do == "exec":
        answer = runtime.ExecSync({1: state["container"], 2: list(words), 3: PATIENCE})
        sys.stdout.buffer.write(answer.get(1, b""))
        sys.stderr.buffer.write(answer.get(2, b""))
        return answer.get(3, 0)
    if do == "restart":
        end(runtime, state)
        start(runtime, name, state)
    elif do == "remove":
        # Its successor may never have been made.
        runtime.StopPodSandbox({1: state["pod"]})
        runtime.RemovePodSandbox({1: state["pod"]})
        (STATE / name).unlink()
    return 0


try:
    sys.exit(main(*sys.argv[1:]))
except grpc.RpcError as error:
    sys.exit(f"{error.code().name}: {error.details()}")
