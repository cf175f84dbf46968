#!/usr/bin/env bash
# hack/chart.sh looks after what is made from the charts.
#
#   hack/chart.sh generate OUT   writes into the folder OUT what hack/generate.sh calls generated: the CustomResourceDefinitions and RBAC rules
#                                in the charts (from OUT's config/, or ours), the charts' README.md, docs/reference/values.md, and the
#                                objects of the kustomize bases under config/
#   hack/chart.sh package DIR    lints the charts with each example of values, and packages them into DIR
set -euo pipefail

cd "$(dirname "$0")/.."
helm=$(hack/tool.sh helm)/helm
kube=1.37.0 # helm, built from its module, believes in a version of long ago
charts=(charts/db-controller charts/db-controller-crds)

# The CustomResourceDefinition of a file, as a template.
crd() {
	awk '
		NR == 1 && $0 == "---" { next }
		/^  annotations:$/ && !done { print; print "    {{- if .Values.crds.keep }}"; print "    helm.sh/resource-policy: keep"; print "    {{- end }}"; next }
		/^  name: / && !done {
			print "  labels:"
			print "    app.kubernetes.io/name: db-controller"
			print "    app.kubernetes.io/part-of: db-controller"
			print "    app.kubernetes.io/component: crds"
			print "    app.kubernetes.io/instance: {{ .Release.Name }}"
			print "    app.kubernetes.io/managed-by: {{ .Release.Service }}"
			done = 1
		}
		{ gsub(/\{\{/, "{{ \"{{\" }}"); print }
	' "$1"
}

# What a template makes, without the marks of Helm: FILE TEMPLATE [ARGUMENT...].
base() {
	local file=$1 template=$2
	shift 2
	{
		echo "# Made from charts/db-controller by hack/chart.sh; change it there, or patch it from an overlay."
		"$helm" template db-controller "$work/charts/db-controller" --namespace db-controller-system --kube-version "$kube" --show-only "templates/$template" \
			--set region=eu,crds.enabled=false "$@" |
			grep -vE '^ *(helm\.sh/chart|app\.kubernetes\.io/managed-by): |^# Source: '
	} >"$file"
}

generate() {
	local out=$1 helm_docs crds roles f to
	helm_docs=$(hack/tool.sh helm-docs)/helm-docs
	crds=config/crd roles=config/rbac/role.yaml
	[ -d "$out/config/crd" ] && crds=$out/config/crd
	[ -f "$out/config/rbac/role.yaml" ] && roles=$out/config/rbac/role.yaml
	work=$(mktemp -d)
	# shellcheck disable=SC2064 # now, while work is set
	trap "rm -rf '$work'" RETURN
	mkdir "$work/charts"
	cp -r "${charts[@]}" "$work/charts/"

	mkdir -p "$work"/charts/{db-controller,db-controller-crds}/templates/crds
	rm -f "$work"/charts/*/templates/crds/*
	for f in "$crds"/*.yaml; do
		to=templates/crds/$(basename "$f")
		{ echo '{{- if .Values.crds.enabled }}'; crd "$f"; echo '{{- end }}'; } >"$work/charts/db-controller/$to"
		crd "$f" >"$work/charts/db-controller-crds/$to"
	done
	{
		echo "# Made from config/rbac/role.yaml by hack/chart.sh: what the markers in the code ask for."
		cat "$roles"
	} >"$work/charts/db-controller/files/rbac.yaml"

	# Twice: a page of the chart, and its values alone for the documentation.
	"$helm_docs" --log-level error --chart-search-root "$work/charts" --sort-values-order file
	"$helm_docs" --log-level error --chart-search-root "$work/charts/db-controller" --sort-values-order file \
		--template-files values.md.gotmpl --output-file values.md

	for f in db-controller db-controller-crds; do
		mkdir -p "$out/charts/$f/templates/crds"
		cp "$work/charts/$f/templates/crds"/* "$out/charts/$f/templates/crds/"
		cp "$work/charts/$f/README.md" "$out/charts/$f/README.md"
	done
	mkdir -p "$out"/charts/db-controller/files "$out"/docs/reference "$out"/config/{rbac,manager,apiserver,poddisruptionbudget,networkpolicy,prometheus}
	cp "$work/charts/db-controller/files/rbac.yaml" "$out/charts/db-controller/files/rbac.yaml"
	cp "$work/charts/db-controller/values.md" "$out/docs/reference/values.md"

	local one='apiServers[0].service=packages.example.com'
	base "$out/config/rbac/bindings.yaml" rbac.yaml --set "$one"
	base "$out/config/rbac/serviceaccounts.yaml" serviceaccounts.yaml --set "$one"
	base "$out/config/manager/manager.yaml" manager.yaml
	base "$out/config/poddisruptionbudget/poddisruptionbudgets.yaml" poddisruptionbudgets.yaml --set "$one"
	base "$out/config/apiserver/apiserver.yaml" apiservers.yaml --set "$one"
	base "$out/config/networkpolicy/networkpolicy.yaml" networkpolicies.yaml --set "$one,networkPolicy.enabled=true"
	base "$out/config/prometheus/monitor.yaml" monitoring.yaml --set metrics.podMonitor.enabled=true,metrics.prometheusRule.enabled=true
}

package() {
	local dir=$1 chart values
	for chart in "${charts[@]}"; do
		[ "$chart" = charts/db-controller ] || "$helm" lint --strict --quiet --kube-version "$kube" "$chart"
		for values in "$chart"/ci/*-values.yaml; do
			[ -e "$values" ] || continue
			"$helm" lint --strict --quiet --kube-version "$kube" "$chart" --values "$values"
		done
		"$helm" package "$chart" --destination "$dir"
	done
}

case "${1:-}" in
generate) generate "$2" ;;
package) package "$2" ;;
*)
	sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
	exit 2
	;;
esac
