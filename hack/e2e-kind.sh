#!/usr/bin/env bash
# hack/e2e-kind.sh tries db-controller in a real Kubernetes cluster, on a machine with docker, kind, kubectl and helm: it makes a kind
# cluster, builds the image and loads it, installs the chart for two regions in two namespaces that enforce the Pod Security Standard
# "restricted", each with a PostgreSQL of its own, declares a service, and waits until both regions are in sync. Then it scales the
# managers of one region from 2 to 4 and waits again.
#
# The tests of this project run without docker and do not run this script: test/chart and test/e2e install the same charts on a real
# kube-apiserver and run the same program as processes.
#
#   CLUSTER=db-controller-e2e  name of the cluster; one that exists is used, and kept
#   KEEP=1                     keep the cluster that was made, to look around
#   IMAGE=db-controller:e2e    name of the image
set -euo pipefail

cd "$(dirname "$0")/.."
cluster=${CLUSTER:-db-controller-e2e}
image=${IMAGE:-db-controller:e2e}
service=packages.example.com

for need in docker kind kubectl helm openssl; do
	command -v "$need" >/dev/null || { echo "make e2e-kind: $need is missing" >&2; exit 1; }
done
tmp=$(mktemp -d)
made=
cleanup() {
	code=$?
	if [ $code != 0 ] && [ -s "$KUBECONFIG" ]; then
		kubectl get pods,dbd --all-namespaces || true
	fi
	if [ -n "$made" ] && [ -z "${KEEP:-}" ]; then
		kind delete cluster --name "$cluster"
	fi
	rm -rf "$tmp"
}
export KUBECONFIG=$tmp/kubeconfig
trap cleanup EXIT

if ! kind get clusters | grep -qx "$cluster"; then
	kind create cluster --name "$cluster" --wait 2m
	made=1
fi
kind get kubeconfig --name "$cluster" >"$KUBECONFIG"
make image IMAGE="$image"
kind load docker-image "$image" --name "$cluster"

# One authority for all regions, and a certificate for each with its identity.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=e2e \
	-keyout "$tmp/ca.key" -out "$tmp/ca.crt" 2>/dev/null
certificate() {
	local region=$1 host=$2
	openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$region" -keyout "$tmp/$region.key" -out "$tmp/$region.csr" 2>/dev/null
	openssl x509 -req -in "$tmp/$region.csr" -CA "$tmp/ca.crt" -CAkey "$tmp/ca.key" -CAcreateserial -days 1 -out "$tmp/$region.crt" 2>/dev/null \
		-extfile <(printf 'subjectAltName=URI:spiffe://db-controller/service/%s/region/%s,DNS:%s\nextendedKeyUsage=serverAuth,clientAuth\n' "$service" "$region" "$host")
}

postgres() {
	kubectl -n "$1" apply -f - <<-EOF
		apiVersion: v1
		kind: Service
		metadata: {name: postgres}
		spec:
		  selector: {app: postgres}
		  ports: [{port: 5432}]
		---
		apiVersion: apps/v1
		kind: StatefulSet
		metadata: {name: postgres}
		spec:
		  serviceName: postgres
		  selector: {matchLabels: {app: postgres}}
		  template:
		    metadata: {labels: {app: postgres}}
		    spec:
		      automountServiceAccountToken: false
		      securityContext: {runAsNonRoot: true, runAsUser: 999, runAsGroup: 999, fsGroup: 999, seccompProfile: {type: RuntimeDefault}}
		      containers:
		        - name: postgres
		          image: postgres:17
		          env:
		            - {name: POSTGRES_USER, value: packages}
		            - {name: POSTGRES_PASSWORD, valueFrom: {secretKeyRef: {name: postgres, key: password}}}
		            - {name: PGDATA, value: /data/pg}
		          ports: [{containerPort: 5432}]
		          readinessProbe: {exec: {command: [pg_isready, -U, packages]}}
		          securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
		          volumeMounts: [{name: data, mountPath: /data}]
		      volumes: [{name: data, emptyDir: {}}]
	EOF
}

# A secret is made from files or pipes, so that it is in no argument list.
secret() {
	kubectl -n "$1" create secret generic "$2" "${@:3}" --dry-run=client -o yaml | kubectl apply -f -
}

helm upgrade --install db-controller-crds charts/db-controller-crds --namespace db-controller-system --create-namespace
for region in eu us; do
	kubectl create namespace "$region" --dry-run=client -o yaml | kubectl apply -f -
	kubectl label --overwrite namespace "$region" pod-security.kubernetes.io/enforce=restricted
	openssl rand -hex 16 | tr -d '\n' >"$tmp/password"
	kubectl -n "$region" get secret postgres >/dev/null 2>&1 || secret "$region" postgres --from-file=password="$tmp/password"
	kubectl -n "$region" get secret postgres -o jsonpath='{.data.password}' | base64 -d >"$tmp/password"
	printf 'host=postgres user=packages dbname=packages sslmode=disable password=%s' "$(cat "$tmp/password")" >"$tmp/dsn"
	secret "$region" database --from-file=dsn="$tmp/dsn"
	host=dbc-db-controller-${service//./-}.$region.svc
	certificate "$region" "$host"
	secret "$region" identity --from-file=tls.crt="$tmp/$region.crt" --from-file=tls.key="$tmp/$region.key" --from-file=ca.crt="$tmp/ca.crt"
	postgres "$region"
	kubectl -n "$region" rollout status statefulset/postgres --timeout 3m
	helm upgrade --install dbc charts/db-controller --namespace "$region" --set region="$region",crds.enabled=false \
		--set image.registry=,image.repository="${image%:*}",image.tag="${image##*:}" \
		--set "apiServers[0].service=$service" --set "rbac.secretNames={database,identity}"
	kubectl -n "$region" apply -f - <<-EOF
		apiVersion: meta.dbcontroller.io/v1alpha1
		kind: Deployment
		metadata: {name: packages.$region}
		spec:
		  service: $service
		  region: $region
		  version: v1
		  endpoint: https://$host:8443
		  database: {secretRef: {name: database}}
		  tls: {secretRef: {name: identity}}
	EOF
done
kubectl -n eu apply -f config/samples/packages.yaml

in_sync() {
	for region in eu us; do
		kubectl -n "$region" rollout status deployments.apps --selector app.kubernetes.io/instance=dbc --timeout 3m
		for condition in Ready CaughtUp; do
			kubectl -n "$region" wait --for="condition=$condition" --timeout 3m "deployments.meta.dbcontroller.io/packages.$region"
		done
	done
}
in_sync
kubectl -n eu scale deployment/dbc-db-controller-manager --replicas 4
in_sync
kubectl get dbd --all-namespaces
echo "both regions are in sync"
