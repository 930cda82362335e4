{{- define "tunesmith.name" -}}
{{ printf "%s-operator" .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "tunesmith.selector" -}}
app.kubernetes.io/name: tunesmith-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tunesmith.labels" -}}
{{ include "tunesmith.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: tunesmith
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}
