{{- define "db-controller.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The release's name is part of every name, so that releases in one namespace do not meet. */}}
{{- define "db-controller.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 48 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 48 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 48 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Objects without a namespace carry it in their name. */}}
{{- define "db-controller.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "db-controller.fullname" .) -}}
{{- end -}}

{{/* (list root component [service]); the API server of a service has its name as well. */}}
{{- define "db-controller.selectorLabels" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ include "db-controller.name" $root }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- if gt (len .) 2 }}
meta.dbcontroller.io/service: {{ include "db-controller.short" (list (index . 2) 63) }}
{{- end }}
{{- end -}}

{{/* (list root component [service]): labels of what is not about this region alone. */}}
{{- define "db-controller.baseLabels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "db-controller.selectorLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: db-controller
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
{{- with $root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* (list root component [service]) */}}
{{- define "db-controller.labels" -}}
{{ include "db-controller.baseLabels" . }}
meta.dbcontroller.io/region: {{ (index . 0).Values.region }}
{{- end -}}

{{- define "db-controller.image" -}}
{{- $i := .Values.image -}}
{{- with $i.registry }}{{ . }}/{{ end }}{{ $i.repository }}
{{- if $i.digest }}@{{ $i.digest }}{{ else }}:{{ default .Chart.AppVersion $i.tag }}{{ end }}
{{- end -}}

{{- define "db-controller.managerServiceAccount" -}}
{{- with .Values.serviceAccount }}{{ if .create }}{{ default (printf "%s-manager" (include "db-controller.fullname" $)) .name }}{{ else }}{{ required "serviceAccount.name is needed when serviceAccount.create is false" .name }}{{ end }}{{ end -}}
{{- end -}}

{{- define "db-controller.apiServiceAccount" -}}
{{- with .Values.apiServer.serviceAccount }}{{ if .create }}{{ default (printf "%s-apiserver" (include "db-controller.fullname" $)) .name }}{{ else }}{{ required "apiServer.serviceAccount.name is needed when apiServer.serviceAccount.create is false" .name }}{{ end }}{{ end -}}
{{- end -}}

{{/* The namespaces whose objects count, as a JSON list; empty: all. */}}
{{- define "db-controller.watchNamespaces" -}}
{{- if .Values.watchNamespaces -}}
{{- .Values.watchNamespaces | uniq | toJson -}}
{{- else if .Values.rbac.namespaced -}}
{{- list .Release.Namespace | toJson -}}
{{- else -}}
[]
{{- end -}}
{{- end -}}

{{/* The namespaces whose Secrets may be read, as a JSON list. */}}
{{- define "db-controller.secretNamespaces" -}}
{{- coalesce .Values.rbac.secretNamespaces .Values.watchNamespaces (list .Release.Namespace) | uniq | toJson -}}
{{- end -}}

{{/* (list text length): the text, or its beginning and a hash where it is too long. */}}
{{- define "db-controller.short" -}}
{{- $text := index . 0 -}}
{{- $max := index . 1 -}}
{{- if gt (len $text) $max -}}
{{- printf "%s-%s" ($text | trunc (int (sub $max 9)) | trimAll "-.") (sha256sum $text | trunc 8) -}}
{{- else -}}
{{- $text -}}
{{- end -}}
{{- end -}}

{{/* (list root service): the name of what belongs to the API server of a service. */}}
{{- define "db-controller.apiName" -}}
{{- include "db-controller.short" (list (printf "%s-%s" (include "db-controller.fullname" (index . 0)) (index . 1 | replace "." "-")) 57) -}}
{{- end -}}

{{/* Milliseconds of a duration such as 1m30s. */}}
{{- define "db-controller.milliseconds" -}}
{{- $sum := 0.0 -}}
{{- $units := dict "ms" 1 "s" 1000 "m" 60000 "h" 3600000 -}}
{{- range regexFindAll "[0-9.]+(ms|s|m|h)" . -1 -}}
{{- $sum = addf $sum (mulf (regexFind "[0-9.]+" . | float64) (index $units (regexFind "[a-z]+" .))) -}}
{{- end -}}
{{- int $sum -}}
{{- end -}}

{{/* The entries of apiServers over the defaults in apiServer, as a JSON list. */}}
{{- define "db-controller.apiServers" -}}
{{- $all := list -}}
{{- range .Values.apiServers -}}
{{- $all = append $all (mergeOverwrite (deepCopy $.Values.apiServer) (deepCopy .)) -}}
{{- end -}}
{{- $all | toJson -}}
{{- end -}}

{{/* What values.schema.json cannot say. */}}
{{- define "db-controller.validate" -}}
{{- if not .Values.region -}}
{{- fail "\n\nregion is required: the name of the region that this release serves, for example --set region=eu\n" -}}
{{- end -}}
{{- $le := .Values.leaderElection -}}
{{- $lease := include "db-controller.milliseconds" $le.leaseDuration | int -}}
{{- $renew := include "db-controller.milliseconds" $le.renewDeadline | int -}}
{{- if ge $renew $lease -}}
{{- fail (printf "\n\nleaderElection: renewDeadline (%s) must be less than leaseDuration (%s): a node stops its work before others may take its shards\n" $le.renewDeadline $le.leaseDuration) -}}
{{- end -}}
{{- if ge (include "db-controller.milliseconds" $le.retryPeriod | int) $renew -}}
{{- fail (printf "\n\nleaderElection: retryPeriod (%s) must be less than renewDeadline (%s)\n" $le.retryPeriod $le.renewDeadline) -}}
{{- end -}}
{{- if lt (int (mul 1000 .Values.terminationGracePeriodSeconds)) $lease -}}
{{- fail (printf "\n\nterminationGracePeriodSeconds (%v) must be at least leaderElection.leaseDuration (%s): a pod hands its shards over before it ends\n" .Values.terminationGracePeriodSeconds $le.leaseDuration) -}}
{{- end -}}
{{- $seen := dict -}}
{{- range include "db-controller.apiServers" . | fromJsonArray -}}
{{- if hasKey $seen .service -}}
{{- fail (printf "\n\napiServers: %s is listed twice: one entry has replicaCount replicas\n" .service) -}}
{{- end -}}
{{- $_ := set $seen .service true -}}
{{- if le (int .terminationGracePeriodSeconds) (int .preStopSeconds) -}}
{{- fail (printf "\n\napiServers: terminationGracePeriodSeconds (%v) of %s must be more than its preStopSeconds (%v)\n" .terminationGracePeriodSeconds .service .preStopSeconds) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.certManager.enabled (not .Values.certManager.issuerRef.name) -}}
{{- fail "\n\ncertManager.issuerRef.name is required when certManager.enabled is true\n" -}}
{{- end -}}
{{- if and .Values.rbac.namespaced .Values.rbac.secretNamespaces -}}
{{- range .Values.rbac.secretNamespaces -}}
{{- if not (has . (include "db-controller.watchNamespaces" $ | fromJsonArray)) -}}
{{- fail (printf "\n\nrbac.secretNamespaces: %s is not watched: with rbac.namespaced only watchNamespaces are\n" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if .Values.crds.enabled -}}
{{- range list "deployments" "servicedescriptors" "verifications" -}}
{{- $crd := lookup "apiextensions.k8s.io/v1" "CustomResourceDefinition" "" (printf "%s.meta.dbcontroller.io" .) -}}
{{- if $crd -}}
{{- $annotations := default dict $crd.metadata.annotations -}}
{{- $owner := index $annotations "meta.helm.sh/release-name" | default "" -}}
{{- $ns := index $annotations "meta.helm.sh/release-namespace" | default "" -}}
{{- if or (ne $owner $.Release.Name) (ne $ns $.Release.Namespace) -}}
{{- $of := ternary (printf "release %s in namespace %s" $owner $ns) "nobody that Helm knows" (ne $owner "") -}}
{{- fail (printf "\n\nThe CustomResourceDefinitions are in this cluster already, and belong to %s.\nUse them as they are with --set crds.enabled=false.\nTo let this release look after them instead:\n\n  for crd in deployments servicedescriptors verifications; do\n    kubectl label --overwrite crd $crd.meta.dbcontroller.io app.kubernetes.io/managed-by=Helm\n    kubectl annotate --overwrite crd $crd.meta.dbcontroller.io meta.helm.sh/release-name=%s meta.helm.sh/release-namespace=%s\n  done\n" $of $.Release.Name $.Release.Namespace) -}}
{{- end -}}
{{- else if and (or $.Values.deployments $.Values.serviceDescriptors) (lookup "v1" "Service" "default" "kubernetes") -}}
{{- fail "\n\ndeployments and serviceDescriptors need the CustomResourceDefinitions to be there before.\nInstall the chart db-controller-crds first and this one with --set crds.enabled=false,\nor install this one without the two lists, and add them with helm upgrade.\n" -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
