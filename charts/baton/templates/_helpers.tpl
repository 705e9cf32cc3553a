{{- /* Names and labels. Nothing here looks at the cluster. */ -}}

{{- define "baton.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- /* At most 45 characters, so that every name below stays a valid label value. */ -}}
{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 45 | trimSuffix "-" -}}
{{- else if contains (include "baton.name" .) .Release.Name -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "baton.name" .) | trunc 45 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "baton.operator" -}}
{{- printf "%s-operator" (include "baton.fullname" .) -}}
{{- end -}}

{{- /* The webhook's Service and Secret; its configuration has the namespace before it, as rotation.py expects. */ -}}
{{- define "baton.webhook" -}}
{{- printf "%s-webhook" (include "baton.operator" .) -}}
{{- end -}}

{{- define "baton.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "baton.operator" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.create is false: name the account in serviceAccount.name" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "baton.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
app.kubernetes.io/name: {{ include "baton.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: baton
{{- end -}}

{{- define "baton.operatorSelector" -}}
app.kubernetes.io/name: {{ include "baton.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- /* registry/repository:tag or registry/repository@digest of {image, root}. */ -}}
{{- define "baton.image" -}}
{{- $image := .image -}}
{{- $repository := $image.repository -}}
{{- with .root.Values.image.registry -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) $repository -}}
{{- end -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (default .root.Chart.AppVersion (default .root.Values.image.tag $image.tag)) -}}
{{- end -}}
{{- end -}}

{{- /* What lets Helm take over an object that a hook of this release made. */ -}}
{{- define "baton.ownership" -}}
meta.helm.sh/release-name: {{ .Release.Name }}
meta.helm.sh/release-namespace: {{ .Release.Namespace }}
{{- end -}}

{{- /* The worker's image with its {flavour} left open: the operator fills it in per profile. */ -}}
{{- define "baton.workerImage" -}}
{{- $tag := .Values.serving.workerImage.tag -}}
{{- if not $tag -}}
{{- $tag = printf "%s-{flavour}" (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- include "baton.image" (dict "image" (dict "repository" .Values.serving.workerImage.repository "tag" $tag "digest" "") "root" .) -}}
{{- end -}}

{{- /* The text of one object whose metadata begins a line, with our labels and the annotations added. */ -}}
{{- define "baton.withMetadata" -}}
{{- $added := dict "labels" (include "baton.labels" .root | fromYaml) -}}
{{- with .annotations -}}
{{- $_ := set $added "annotations" . -}}
{{- end -}}
{{- .text | replace "\nmetadata:\n" (printf "\nmetadata:\n%s\n" (toYaml $added | indent 2)) -}}
{{- end -}}
