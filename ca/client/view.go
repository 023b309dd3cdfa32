package client

import (
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/ca/wire"
	"github.com/entente-mesh/entente/federation/catalog"
)

// View is the picture of the trust domain that the CA gives this subscriber. It
// is immutable, and so are the records in it.
type View struct {
	Revision uint64 // 0: nothing received yet
	// Changed is the revision at which anything below but Instances last changed
	// here: two views with the same Changed differ in nothing else. (Revisions pass
	// that bring a subscriber nothing new.)
	Changed uint64
	Cluster *statev1.Cluster
	Entries []*statev1.Entry  // agents: of this host; gateways: their own; by id
	Objects []*statev1.Object // of the catalogue, by key
	Members []*statev1.Member // CA nodes, by id
	// Bundles holds SPIFFE bundles (JSON) by trust domain name: the own domain's
	// always, a foreign one only if an entry of this subscriber federates with it.
	Bundles map[string][]byte
	// Distrust knows SVIDs of the own domain that are not to be accepted although they
	// are valid.
	Distrust *ca.Distrusted
	// Announced knows those of Distrust and those that it will know in less than a second:
	// who holds or shows one of them renews it now. The same as Distrust if there are none.
	Announced *ca.Distrusted
	// Tainted are ids of authorities: SVIDs under them are to be issued anew, spread over
	// ReissueWithin.
	Tainted       []string
	ReissueWithin time.Duration
	// Urgent counts what has come ahead of its revision: with another number Distrust,
	// Tainted or Bundles may differ although Changed is the same.
	Urgent uint64
	// Skipped names what the CA sent and this release does not know, TooOld what of it
	// restricts and so is not enforced here; at most 32 each.
	Skipped, TooOld []string
	// Instances are all known places that serve, by service, agent and id.
	Instances []Instance
}

// Instance is one place where a service of the own domain is served.
type Instance = catalog.Endpoint

// instanceToWire is what this process says of an instance. The CA knows better who says so,
// and in which session.
func instanceToWire(i Instance) *ententev1.Instance {
	return wire.FromInstance(presence.Instance{Endpoint: i})
}
