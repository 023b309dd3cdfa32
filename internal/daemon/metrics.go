package daemon

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// Metrics is the registry of a process. What is registered begins with the process's prefix, "entente_ca_" of a CA node;
// the runtime's metrics and entente_build_info are there from the beginning.
type Metrics struct {
	*prometheus.Registry
	kind string

	mu         sync.Mutex
	collectors []prometheus.Collector // what was registered, build info included
}

// NewMetrics makes the registry of a process. kind is "ca", "agent" or "gateway".
func NewMetrics(kind string) *Metrics {
	m := &Metrics{Registry: prometheus.NewRegistry(), kind: kind}
	version, commit := Build()
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "entente_build_info", Help: "1; its labels say which build this is.",
		ConstLabels: prometheus.Labels{"version": version, "commit": commit, "go": runtime.Version()},
	})
	build.Set(1)
	m.Registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), build)
	m.collectors = append(m.collectors, build)
	return m
}

// Name is the name of a metric of this process: "leader" is entente_ca_leader at a CA node.
func (m *Metrics) Name(name string) string { return "entente_" + m.kind + "_" + name }

// Register takes a metric, if its name begins as this process's do.
func (m *Metrics) Register(c prometheus.Collector) error {
	descriptions := make(chan *prometheus.Desc)
	go func() {
		c.Describe(descriptions)
		close(descriptions)
	}()
	var foreign *prometheus.Desc
	for d := range descriptions {
		if !strings.HasPrefix(d.String(), `Desc{fqName: "`+m.Name("")) {
			foreign = d
		}
	}
	if foreign != nil {
		return fmt.Errorf("the name of a metric of this process begins with %s, not as that of %s", m.Name(""), foreign)
	}
	if err := m.Registry.Register(c); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.collectors = append(m.collectors, c)
	return nil
}

// MustRegister is Register; it panics where that fails.
func (m *Metrics) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		if err := m.Register(c); err != nil {
			panic(err)
		}
	}
}

// Collectors are the metrics that are this process's own, for the page that lists them.
func (m *Metrics) Collectors() []prometheus.Collector {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.collectors)
}
