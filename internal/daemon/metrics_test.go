package daemon

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

// A process's registry takes its own metrics only, and has those of the runtime and the
// build from the beginning.
func TestMetrics(t *testing.T) {
	m := NewMetrics("gateway")
	counter := func(name string) prometheus.Collector {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: "x"})
	}
	if err := m.Register(counter(m.Name("x_total"))); err != nil { // control
		t.Error(err)
	}
	if err := m.Register(counter("entente_gateway_x_total")); err == nil {
		t.Error("the same twice")
	}
	for _, name := range []string{"entente_agent_x_total", "entente_x_total", "x_total", "entente_gatewayx_total"} {
		if err := m.Register(counter(name)); err == nil || !strings.Contains(err.Error(), "begins with entente_gateway_") {
			t.Errorf("%s: %v", name, err)
		}
	}
	families, err := m.Gather()
	if err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	for _, f := range families {
		there[f.GetName()] = true
		if f.GetName() == "entente_build_info" {
			labels := map[string]string{}
			for _, l := range f.GetMetric()[0].GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if labels["version"] == "" || !strings.HasPrefix(labels["go"], "go") || len(labels) != 3 {
				t.Errorf("build: %q", labels)
			}
		}
	}
	for _, name := range []string{"go_goroutines", "process_start_time_seconds", "entente_build_info", "entente_gateway_x_total"} {
		if !there[name] {
			t.Errorf("no %s", name)
		}
	}
}
