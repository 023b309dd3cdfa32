package meshagent

import (
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/meshagent/services"
)

type metrics struct {
	signed, jwts, wits, failures, ended prometheus.Counter
}

// newMetrics registers the agent's metrics.
func newMetrics(registry *daemon.Metrics, store *store, ca *client.Client, registered *services.Registry) *metrics {
	m := &metrics{
		signed:   prometheus.NewCounter(prometheus.CounterOpts{Name: "entente_agent_svids_signed_total", Help: "X.509-SVIDs that were signed for entries of this host."}),
		jwts:     prometheus.NewCounter(prometheus.CounterOpts{Name: "entente_agent_jwt_svids_signed_total", Help: "JWT-SVIDs that were signed for workloads of this host; what was answered from memory does not count."}),
		wits:     prometheus.NewCounter(prometheus.CounterOpts{Name: "entente_agent_wit_svids_signed_total", Help: "WIT-SVIDs that were signed for entries of this host."}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{Name: "entente_agent_sign_failures_total", Help: "Attempts to get an SVID of any kind signed that failed."}),
		ended:    prometheus.NewCounter(prometheus.CounterOpts{Name: "entente_agent_svids_ended_total", Help: "X.509- and WIT-SVIDs that ended before new ones were signed, and are handed out no more."}),
	}
	gauge := func(name, help string, value func(*State) float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return value(store.State()) })
	}
	registry.MustRegister(m.signed, m.jwts, m.wits, m.failures, m.ended,
		gauge("entente_agent_entries", "Entries of this host.", func(s *State) float64 { return float64(len(s.Identities)) }),
		gauge("entente_agent_entries_without_svid", "Entries of this host that have no valid X.509-SVID.", func(s *State) float64 {
			return float64(len(slices.DeleteFunc(slices.Clone(s.Identities), func(i *Identity) bool { return i.SVID != nil })))
		}),
		gauge("entente_agent_revision", "Revision of the CA's state that is in use.", func(*State) float64 { return float64(ca.View().Revision) }),
		gauge("entente_agent_ca_nodes_avoided", "CA nodes that two others contradicted, and that this agent avoids.", func(*State) float64 { return float64(len(ca.Comparison().Avoided)) }),
		gauge("entente_agent_ca_nodes_compared", "CA nodes other than the connected one whose statements are fresh.", func(*State) float64 { return float64(len(ca.Comparison().Heard)) }),
		gauge("entente_agent_ca_nodes_in_doubt", "1 while the connected CA node and the only other one in reach contradict each other.", func(*State) float64 {
			if ca.Comparison().Doubt != "" {
				return 1
			}
			return 0
		}),
		gauge("entente_agent_services_unhealthy", "Services of this host that listen, are not drained, and are not healthy.", func(s *State) float64 {
			return float64(len(slices.DeleteFunc(slices.Clone(s.Services), func(s Service) bool { return s.Draining || s.Instance.Healthy() })))
		}),
		gauge("entente_agent_registrations_broken", "Files that register services and whose newest content cannot be used.", func(*State) float64 { return float64(len(registered.Snapshot().Broken())) }),
		gauge("entente_agent_first_expiry_seconds", "Seconds until the first X.509-SVID held here ends; negative: it has ended; 0: none is held.", func(s *State) float64 {
			var first time.Time
			consider := func(end time.Time) {
				if first.IsZero() || end.Before(first) {
					first = end
				}
			}
			if s.own != nil {
				consider(s.own.Certificates[0].NotAfter)
			}
			for _, identity := range s.Identities {
				if identity.SVID != nil {
					consider(identity.SVID.NotAfter)
				}
			}
			if first.IsZero() {
				return 0
			}
			return time.Until(first).Seconds()
		}),
	)
	return m
}
