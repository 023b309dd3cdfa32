// Package wire puts what Sync tells of into messages, and takes it out of them again: the
// instances of the presence lane and the updates of the policy lane. Both ends of a stream
// use it, so that what one says and what the other makes of it stand side by side.
package wire

import (
	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/presence"
	"github.com/entente-mesh/entente/federation/catalog"
)

// FromInstance is what an instance says on the wire.
func FromInstance(i presence.Instance) *ententev1.Instance {
	var proof *ententev1.SessionProof
	if i.Proof != (presence.Proof{}) {
		proof = &ententev1.SessionProof{PublicKey: []byte(i.Proof.PublicKey), Signature: []byte(i.Proof.Signature)}
	}
	health := ententev1.Health_HEALTH_UNHEALTHY
	switch {
	case i.Service == "": // a session
		health = ententev1.Health_HEALTH_UNSPECIFIED
	case i.Healthy:
		health = ententev1.Health_HEALTH_HEALTHY
	}
	return &ententev1.Instance{
		Proof:      proof,
		Service:    i.Service,
		Id:         i.ID,
		Agent:      i.Agent,
		Datacenter: i.Datacenter,
		Address:    i.Address,
		Health:     health,
		Stale:      i.Stale,
		BootId:     i.Version.BootID,
		Connect:    i.Version.Connect,
	}
}

// FromInstances is FromInstance of each.
func FromInstances(list []presence.Instance) []*ententev1.Instance {
	out := make([]*ententev1.Instance, len(list))
	for i, instance := range list {
		out[i] = FromInstance(instance)
	}
	return out
}

// ToInstance is the inverse of FromInstance, but for the proof: that is for whom verifies it.
func ToInstance(i *ententev1.Instance) presence.Instance {
	return presence.Instance{
		Endpoint: catalog.Endpoint{
			Service:    i.GetService(),
			ID:         i.GetId(),
			Agent:      i.GetAgent(),
			Datacenter: i.GetDatacenter(),
			Address:    i.GetAddress(),
			Healthy:    i.GetHealth() == ententev1.Health_HEALTH_HEALTHY,
			Stale:      i.GetStale(),
		},
		Version: presence.Version{BootID: i.GetBootId(), Connect: i.GetConnect()},
	}
}
