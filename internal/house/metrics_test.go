package house

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/entente-mesh/entente/ca/catest"
	"github.com/entente-mesh/entente/ca/node"
	gateway "github.com/entente-mesh/entente/eastwest-gateway"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/peer/peertest"
	"github.com/entente-mesh/entente/meshagent"
	"github.com/entente-mesh/entente/meshagent/sidecar"
)

const metricsPage = "../../docs/reference/metrics.md"

// The page of metrics is what the processes register, with everything that a configuration
// can add.
func TestDocumentedMetrics(t *testing.T) {
	var b strings.Builder
	b.WriteString(`# Metrics

What ` + "`/metrics`" + ` of ` + "`admin.listen`" + ` has, by process. Beside these every process has ` + "`go_…` and `process_…`" + ` of the [Prometheus client](https://github.com/prometheus/client_golang), with the memory, goroutines, files and processor time that it uses.
A metric's name begins with its process: ` + "`entente_ca_`, `entente_agent_`, `entente_gateway_`" + `. Sidecars belong to the agent's process. What to alert on stands in [operations.md](../operations.md#what-to-alert-on).

This page is made from what the processes register: ` + "`go test ./internal/house -run TestDocumentedMetrics -update`" + `.
`)
	for _, process := range []struct {
		name    string
		metrics *daemon.Metrics
	}{{"CA node", nodeMetrics(t)}, {"Agent, with its sidecars", agentMetrics(t)}, {"Gateway and edge", gatewayMetrics(t)}} {
		fmt.Fprintf(&b, "\n## %s\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n", process.name)
		rows, err := rowsOf(process.metrics)
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range rows {
			b.WriteString(row)
		}
	}
	if *update {
		if err := os.WriteFile(metricsPage, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(metricsPage)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != b.String() {
		t.Errorf("%s is not what the processes register: run this test with -update", metricsPage)
	}
}

// Every metric that the code or another page names is on the page.
func TestDocumentedMetricsAreAll(t *testing.T) {
	page, err := os.ReadFile(metricsPage)
	if err != nil {
		t.Fatal(err)
	}
	for _, complaint := range unlisted(os.DirFS("../.."), string(page)) {
		t.Error(complaint)
	}
}

func TestDocumentedMetricsAreAllNotices(t *testing.T) {
	const page = "| `entente_ca_leader` | gauge | | 1 while it leads. |\n"
	for _, test := range []struct{ name, text, want string }{
		{"ca/a.go", "package ca\n\nvar a = `entente_ca_leader`\n", ""}, // control
		{"docs/a.md", "`entente_ca_leader`", ""},
		{"CHANGELOG.md", "`entente_requests_total`", ""}, // what was
		{"ca/a_test.go", "package ca\n\nvar a = `entente_ca_gone`\n", ""},
		{"ca/a.go", "package ca\n\nvar a = `entente_ca_gone`\n", "ca/a.go:3: entente_ca_gone"},
		{"ca/a.go", "package ca\n\n// entente_ca_gone counts.\nvar a = `entente_proof`\n", ""},
		{"docs/a.md", "rate(entente_ca_gone_total)", "docs/a.md: entente_ca_gone_total"},
		{"ca/a.go", "package ca\n\nvar a = prometheus.NewRegistry()\n", "ca/a.go:3: only internal/daemon makes a registry"},
		{"internal/daemon/a.go", "package daemon\n\nvar a = prometheus.NewRegistry()\n", ""},
	} {
		got := unlisted(fstest.MapFS{test.name: {Data: []byte(test.text)}}, page)
		switch {
		case test.want == "" && len(got) > 0, test.want != "" && (len(got) != 1 || !strings.Contains(got[0], test.want)):
			t.Errorf("%s, %q: %q", test.name, test.text, got)
		}
	}
}

var metricName = regexp.MustCompile(`entente_(?:ca|agent|gateway)_\w+`)

func unlisted(tree fs.FS, page string) (complaints []string) {
	listed := func(name string) bool {
		for _, suffix := range []string{"", "_bucket", "_count", "_sum"} { // of a histogram
			if strings.Contains(page, "`"+strings.TrimSuffix(name, suffix)+"`") {
				return true
			}
		}
		return false
	}
	for file := range goFiles(tree, &complaints) {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, positions, err := parse(tree, file, parser.SkipObjectResolution)
		if err != nil {
			return append(complaints, err.Error())
		}
		ast.Inspect(f, func(n ast.Node) bool {
			at := func() token.Position { return positions.Position(n.Pos()) }
			switch n := n.(type) {
			case *ast.SelectorExpr:
				if x, ok := n.X.(*ast.Ident); ok && x.Name == "prometheus" && strings.HasSuffix(n.Sel.Name, "Registry") && n.Sel.Name != "Registry" && path.Dir(file) != "internal/daemon" {
					complaints = append(complaints, fmt.Sprintf("%s:%d: only internal/daemon makes a registry", file, at().Line))
				}
			case *ast.BasicLit:
				text, err := strconv.Unquote(n.Value)
				if err == nil && n.Kind == token.STRING && metricName.FindString(text) == text && text != "" && !listed(text) {
					complaints = append(complaints, fmt.Sprintf("%s:%d: %s is not on the page of metrics: have TestDocumentedMetrics register it", file, at().Line, text))
				}
			}
			return true
		})
	}
	err := fs.WalkDir(tree, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !strings.HasSuffix(name, ".md") || name == "CHANGELOG.md" {
			return err
		}
		text, err := fs.ReadFile(tree, name)
		for _, metric := range metricName.FindAllString(string(text), -1) {
			if !listed(metric) && !strings.HasSuffix(metric, "_") {
				complaints = append(complaints, fmt.Sprintf("%s: %s is not on the page of metrics", name, metric))
			}
		}
		return err
	})
	if err != nil {
		complaints = append(complaints, err.Error())
	}
	return complaints
}

var (
	described     = regexp.MustCompile(`^Desc\{fqName: ("(?:[^"\\]|\\.)*"), help: ("(?:[^"\\]|\\.)*"), unit: "[^"]*", constLabels: \{(.*)\}, variableLabels: \{(.*)\}\}$`)
	constantLabel = regexp.MustCompile(`(\w+)="(?:[^"\\]|\\.)*"`)
)

// rowsOf is the table of a registry's metrics, by name.
func rowsOf(metrics *daemon.Metrics) ([]string, error) {
	families, err := metrics.Gather()
	if err != nil {
		return nil, err
	}
	types := map[string]string{}
	for _, f := range families {
		types[f.GetName()] = strings.ToLower(f.GetType().String())
	}
	rows := map[string]string{}
	for _, c := range metrics.Collectors() {
		descriptions := make(chan *prometheus.Desc, 100)
		c.Describe(descriptions)
		close(descriptions)
		for d := range descriptions {
			parts := described.FindStringSubmatch(d.String())
			if parts == nil {
				return nil, fmt.Errorf("cannot read %s", d)
			}
			name, _ := strconv.Unquote(parts[1])
			help, _ := strconv.Unquote(parts[2])
			var labels []string
			for _, label := range constantLabel.FindAllStringSubmatch(parts[3], -1) {
				labels = append(labels, "`"+label[1]+"`")
			}
			for label := range strings.SplitSeq(parts[4], ",") {
				if label != "" {
					labels = append(labels, "`"+label+"`")
				}
			}
			kind := types[name]
			switch c.(type) { // without a child nothing is gathered
			case *prometheus.CounterVec:
				kind = "counter"
			case *prometheus.GaugeVec:
				kind = "gauge"
			case *prometheus.HistogramVec:
				kind = "histogram"
			}
			if kind == "" || help == "" {
				return nil, fmt.Errorf("%s has no type or no help", name)
			}
			rows[name] = fmt.Sprintf("| `%s` | %s | %s | %s |\n", name, kind, strings.Join(labels, ", "), strings.ReplaceAll(help, "|", `\|`))
		}
	}
	var sorted []string
	for _, row := range rows {
		sorted = append(sorted, row)
	}
	slices.Sort(sorted)
	return sorted, nil
}

func nodeMetrics(t *testing.T) *daemon.Metrics {
	td := spiffeid.RequireTrustDomainFromString("banking.example")
	root := peertest.NewAuthority(td)
	key, err := x509.MarshalPKCS8PrivateKey(root.Key)
	if err != nil {
		t.Fatal(err)
	}
	upstream := node.Upstream{Certificate: write(t, "root.pem", "CERTIFICATE", root.Cert.Raw), Key: write(t, "root.key", "PRIVATE KEY", key)}
	return catest.Start(t, catest.Options{Upstream: upstream}).Node().Metrics()
}

func write(t *testing.T, name, kind string, der []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func agentMetrics(t *testing.T) *daemon.Metrics {
	dir := t.TempDir()
	config, err := meshagent.ReadConfig("agent.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: h1\ndatacenter: dc1\ndataDir: %s\nca: {token: %s}\nsidecar: {inbound: \"127.0.0.1:1\"}\naccessLog: {file: %s}\n",
		filepath.Join(dir, "data"), catest.Start(t, catest.Options{}).AgentToken("h1", "dc1", "127.0.0.1"), filepath.Join(dir, "access.jsonl"))))
	if err != nil {
		t.Fatal(err)
	}
	agent, err := meshagent.New(config, nil)
	if err != nil {
		t.Fatal(err)
	}
	metrics := agent.Metrics()
	records, err := config.AccessLog.Open(metrics)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { records.Close() })
	if _, err := sidecar.New(sidecar.Config{TrustDomain: config.Domain(), Datacenter: "dc1", Agent: "h1", Metrics: metrics}, agent); err != nil {
		t.Fatal(err)
	}
	return metrics
}

func gatewayMetrics(t *testing.T) *daemon.Metrics {
	config, err := gateway.ReadConfig("gateway.yaml", strings.NewReader(fmt.Sprintf(
		"trustDomain: banking.example\nname: gw-1\ndatacenter: dc1\nworkloadAPI: {socket: /nowhere.sock}\nca: {addresses: [\"127.0.0.1:1\"]}\neastWest: {listen: \"127.0.0.1:0\"}\naccessLog: {file: %s}\n",
		filepath.Join(t.TempDir(), "access.jsonl"))))
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.New(config, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return g.Metrics()
}
