package gateway

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/entente-mesh/entente/ca/client"
)

// register registers what comparing the CA nodes came to; before Run it is nothing.
func (g *Gateway) register() {
	gauge := func(name, help string, value func(client.Comparison) int) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
			if ca := g.ca.Load(); ca != nil {
				return float64(value(ca.Comparison()))
			}
			return 0
		})
	}
	g.metrics.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "entente_gateway_drained", Help: "1 while an administrator has it drained: it takes no new connections."}, func() float64 {
			if g.engine.Drained() != nil {
				return 1
			}
			return 0
		}),
		gauge("entente_gateway_ca_nodes_avoided", "CA nodes that two others contradicted, and that this gateway avoids.", func(is client.Comparison) int { return len(is.Avoided) }),
		gauge("entente_gateway_ca_nodes_compared", "CA nodes other than the connected one whose statements are fresh.", func(is client.Comparison) int { return len(is.Heard) }),
		gauge("entente_gateway_ca_nodes_in_doubt", "1 while the connected CA node and the only other one in reach contradict each other.", func(is client.Comparison) int { return min(len(is.Doubt), 1) }),
	)
}
