"""Manifests fit KubeRay's own schemas, in which we refuse unknown keys, and say what the configuration says."""

import gzip
import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from isthmus.cluster.cli.planning import app
from isthmus.cluster.manifests import render as kubernetes
from isthmus.cluster.submission.job import job_environment
from isthmus.trainer.config.loading import to_yaml

from .configs import job_config

pytestmark = pytest.mark.unit
SCHEMAS = Path(__file__).parents[2] / "data" / "kuberay"


def schema(kind):
    plural = {"RayJob": "rayjobs", "RayCluster": "rayclusters"}[kind]
    return strict(json.loads(gzip.decompress((SCHEMAS / f"{plural}.v1.schema.json.gz").read_bytes())))


def strict(node):
    """Refuse keys that the schema does not know, so that a misspelt field cannot pass."""
    if isinstance(node, dict):
        node = {key: strict(value) for key, value in node.items() if not key.startswith("x-kubernetes")}
        if "properties" in node and node.get("type") == "object":
            open_metadata = not node["properties"]
            node.setdefault("additionalProperties", open_metadata)
    elif isinstance(node, list):
        node = [strict(item) for item in node]
    return node


def validate(manifest):
    jsonschema.Draft202012Validator(schema(manifest["kind"])).validate(
        {k: v for k, v in manifest.items() if k != "metadata"}
    )


def gpu_config(**kubernetes_section):
    cluster = {
        "workers": {"min": 8, "max": 32, "gpus": 1, "cpus": 4},
        "kubernetes": kubernetes_section,
    }
    data = {"sources": [{"manifest": "s3://bucket/m"}], "lanes": 64, "backend": "ray", "readers": 48}
    stage = {"steps": 10, "global_batch_size": 64, "micro_batch_size": 4, "deepspeed": "zero1"}
    return job_config(cluster=cluster, data=data, stage1=stage)


def test_job_and_cluster_fit_kuberays_schemas():
    config = gpu_config(queue="team", secret="s3-credentials", service_account="trainer")
    validate(kubernetes.ray_job(config))
    validate(kubernetes.ray_cluster(config))


def test_the_strict_schema_refuses_a_misspelt_key():
    manifest = kubernetes.ray_cluster(gpu_config())
    manifest["spec"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        validate(manifest)


def test_groups_are_sized_by_the_configuration():
    gpu, readers = kubernetes.ray_cluster(gpu_config())["spec"]["workerGroupSpecs"]
    assert (gpu["minReplicas"], gpu["replicas"], gpu["maxReplicas"]) == (1, 4, 4)  # 8 GPUs a pod
    assert (readers["minReplicas"], readers["maxReplicas"]) == (1, 3)  # 48 readers, 16 CPUs a pod
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": "8"}


def test_the_head_does_no_work_and_is_not_on_spot():
    head = kubernetes.ray_cluster(gpu_config())["spec"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "tolerations" not in head["template"]["spec"]


def test_workers_tolerate_spot_and_drain_before_they_end():
    config = gpu_config(
        workers={"cpus": 8, "memory": "64Gi", "gpus": 1, "tolerations": ["spot"], "selector": {"tier": "spot"}}
    )
    pod = kubernetes.ray_cluster(config)["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert pod["tolerations"] == [{"key": "spot", "operator": "Exists"}]
    assert pod["nodeSelector"] == {"tier": "spot"}
    hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]
    assert hook["command"] == ["python", "-m", "isthmus.cluster.ray_nodes.drain"]
    assert pod["terminationGracePeriodSeconds"] > config.cluster.stop_grace_seconds


def test_token_authentication_is_on_and_secrets_are_references():
    text = yaml.safe_dump_all(kubernetes.render(gpu_config(secret="s3-credentials")))
    cluster = kubernetes.ray_cluster(gpu_config(secret="s3-credentials"))
    container = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert container["envFrom"] == [{"secretRef": {"name": "s3-credentials"}}]
    assert "AWS_SECRET_ACCESS_KEY=" not in text


def test_kueue_has_room_for_exactly_one_run():
    flavor, cluster_queue, local_queue = kubernetes.queue(gpu_config(queue="team"))
    resources = cluster_queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    assert {item["name"]: item["nominalQuota"] for item in resources} == {
        "cpu": 4 + 4 * 32 + 3 * 16,
        "memory": f"{(16 + 4 * 256 + 3 * 64) * 1024}Mi",
        "nvidia.com/gpu": 32,
    }
    assert local_queue["spec"]["clusterQueue"] == cluster_queue["metadata"]["name"]
    job = kubernetes.ray_job(gpu_config(queue="team"))
    assert job["spec"]["suspend"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local_queue["metadata"]["name"]
    assert flavor["metadata"]["name"] == cluster_queue["spec"]["resourceGroups"][0]["flavors"][0]["name"]


def test_a_run_in_a_queue_has_a_fixed_size_which_kueue_insists_on():
    queued, alone = (kubernetes.ray_job(gpu_config(**section)) for section in ({"queue": "team"}, {}))
    validate(queued)
    spec = queued["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in spec
    assert queued["spec"]["shutdownAfterJobFinishes"]
    assert "clusterSelector" not in queued["spec"]
    assert alone["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True


def test_the_verbs_know_a_rayjob_as_a_run(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the machine that renders")
    spec = kubernetes.ray_job(gpu_config())["spec"]
    assert spec["metadata"]["isthmus_run"] == "demo"
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 120
    assert "ISTHMUS_SECRETS" not in environment


def test_no_queue_no_kueue():
    kinds = [manifest["kind"] for manifest in kubernetes.render(gpu_config())]
    assert kinds == ["NetworkPolicy", "ConfigMap", "RayJob"]


def with_data(config, **changes):
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def pods_of(spec):
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def test_a_reader_pod_offers_what_its_readers_ask_for():
    from ray.autoscaler._private.kuberay.autoscaling_config import _get_custom_resources

    config = with_data(gpu_config(), reader_resources={"data": 1, "CPU": 2})
    manifest = kubernetes.ray_cluster(config)
    validate(manifest)
    gpu, readers = manifest["spec"]["workerGroupSpecs"]
    assert readers["maxReplicas"] == 6  # 48 readers of 2 CPUs, 16 CPUs a pod
    assert _get_custom_resources({}, readers["rayStartParams"], "readers") == {"data": 8}
    assert gpu["rayStartParams"] == {}
    assert kubernetes.ray_cluster(gpu_config())["spec"]["workerGroupSpecs"][1]["rayStartParams"] == {}


@pytest.mark.parametrize(("backend", "group"), [("ray", "readers"), ("process", "gpu")])
def test_the_cache_has_a_volume_of_its_size_where_the_readers_run(backend, group):
    config = with_data(gpu_config(queue="team"), backend=backend, cache_dir="/cache", cache_bytes=10 << 30)
    manifest = kubernetes.ray_job(config)
    validate(manifest)
    cluster = manifest["spec"]["rayClusterSpec"]
    mounted = {}
    for spec in cluster["workerGroupSpecs"]:
        pod = spec["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for mount in pod["containers"][0]["volumeMounts"]:
            if mount["mountPath"] == "/cache":
                mounted[spec["groupName"]] = volumes[mount["name"]]["emptyDir"]["sizeLimit"]
        asked = pod["containers"][0]["resources"]["requests"].get("ephemeral-storage")
        assert asked == mounted.get(spec["groupName"])
    assert mounted == {group: "11264Mi"}  # 10 GiB and a tenth
    (flavor,) = kubernetes.queue(config)[1]["spec"]["resourceGroups"][0]["flavors"]
    assert "ephemeral-storage" in {item["name"] for item in flavor["resources"]}, "Kueue refuses what no quota covers"


def test_pods_fit_pod_security_restricted():
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/: what a pod has to say itself."""
    manifest = kubernetes.ray_job(gpu_config())
    validate(manifest)
    spec = manifest["spec"]["rayClusterSpec"]
    contexts = [spec["autoscalerOptions"]["securityContext"]]
    for pod in pods_of(spec):
        assert pod["spec"]["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
        assert all({"emptyDir", "configMap"} & volume.keys() for volume in pod["spec"]["volumes"])
        contexts += [container["securityContext"] for container in pod["spec"]["containers"]]
    assert len(contexts) == 4
    assert all(c == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}} for c in contexts)


def test_only_the_runs_own_pods_reach_each_other():
    config = gpu_config()
    policy = kubernetes.network_policy(config)
    own = policy["spec"]["podSelector"]["matchLabels"]
    inside, outside = policy["spec"]["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert {port["port"] for port in outside["ports"]} == {8265, 8080}
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    for pod in pods_of(kubernetes.ray_job(config)["spec"]["rayClusterSpec"]):
        assert own.items() <= pod["metadata"]["labels"].items()


def test_variables_reach_driver_and_workers_and_secrets_are_refused():
    config = gpu_config()
    cluster = {"environment": {"NCCL_SOCKET_IFNAME": "eth0", "PYTHONUNBUFFERED": "0"}}
    spec = kubernetes.ray_job(job_config(cluster=cluster))["spec"]
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert environment["NCCL_SOCKET_IFNAME"] == "eth0"
    assert environment["PYTHONUNBUFFERED"] == "1", "what isthmus needs has precedence"
    for wrong in ({"AWS_SECRET_ACCESS_KEY": "x"}, {"A B": "x"}):
        with pytest.raises(ValueError, match="environment"):
            job_config(cluster={"environment": wrong})
    assert config.cluster.environment == {}


def test_a_lost_head_is_replaced_often_and_a_user_error_never():
    spec = kubernetes.ray_job(gpu_config())["spec"]
    assert spec["backoffLimit"] == 20
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["ISTHMUS_NO_RETRY"] == "1"
    assert "ISTHMUS_NO_RETRY" not in job_environment(gpu_config())


@pytest.mark.parametrize("kind", ["rayjob", "raycluster"])
def test_pods_mount_only_configurations_that_are_printed_with_them(tmp_path, kind):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(gpu_config()))
    result = CliRunner().invoke(app, ["manifests", str(recipe), "--kind", kind])
    documents = {document["kind"]: document for document in yaml.safe_load_all(result.output)}
    assert ("NetworkPolicy" in documents) == (kind == "raycluster"), "a standing cluster has no other document for it"
    spec = documents["RayJob"]["spec"]["rayClusterSpec"] if kind == "rayjob" else documents["RayCluster"]["spec"]
    volumes = [volume for pod in pods_of(spec) for volume in pod["spec"].get("volumes", ())]
    mounted = {volume["configMap"]["name"] for volume in volumes if "configMap" in volume}
    assert mounted == ({documents["ConfigMap"]["metadata"]["name"]} if kind == "rayjob" else set())


def test_the_command_prints_documents_without_yaml_anchors(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(gpu_config(queue="team")))
    result = CliRunner().invoke(app, ["manifests", str(recipe), "cluster.kubernetes.image=registry.example/isthmus:1"])
    assert result.exit_code == 0, result.output
    assert "&id" not in result.output
    documents = list(yaml.safe_load_all(result.output))
    assert [document["kind"] for document in documents][-1] == "RayJob"
    spec = documents[-1]["spec"]["rayClusterSpec"]
    pods = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    assert {pod["spec"]["containers"][0]["image"] for pod in pods} == {"registry.example/isthmus:1"}
