package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/local"
	"github.com/entente-mesh/entente/ca/rotation"
)

// ActivateOffline takes this node's own PREPARED authority into use without quorum.
func (as *authorities) ActivateOffline(id, who string) error {
	var a *statev1.Authority
	as.Read(func(st *domain.State) { a, _ = st.Authority(id) })
	switch {
	case as.noQuorumSince(time.Now()).IsZero():
		return errors.New("there is quorum: have it agreed")
	case a.GetMemberId() != as.own.id:
		return errors.New("without quorum a CA node activates an authority of its own only: ask at the node that it belongs to")
	case !rotation.MayTakeOffline(a, as.own.id):
		return fmt.Errorf("authority %.12s is %s and was not marked ready before the quorum was lost: without quorum nobody can say that everybody holds it", id, ca.PhaseName(a.GetPhase()))
	case !as.signer.Has(id):
		return fmt.Errorf("the key of authority %.12s is not in this node's key store", id)
	}
	if err := as.signerClock().Check(time.Now()); err != nil {
		return err
	}
	if as.local.view().Took(id) {
		return nil
	}
	as.local.change(func(v local.View) local.View { return v.WithAuthority(a) })
	as.audit.Act(who, "ActivateAuthority", []string{"authority/" + id, "without quorum"}, 0, nil)
	as.log.Warn("authority signs from now on, without quorum: the cluster learns of it when there is one", "authority", id, "use", a.GetUse().String())
	as.applied.tell() // the node's own SVIDs follow
	return nil
}

// IsOffline tells whether this node took an authority into use without quorum.
func (as *authorities) IsOffline(id string) bool { return as.local.view().Took(id) }

// reconcile tells the cluster what this node did without it, and gives up what the
// cluster has decided otherwise meanwhile.
func (as *authorities) reconcile(ctx context.Context, own rotation.Own, u use) error {
	id := as.local.view().Taken(u.of)
	if id == "" {
		return nil
	}
	have := own.Known[id]
	if rotation.MayTakeOffline(have, as.own.id) && as.noQuorumSince(time.Now()).IsZero() {
		if err := as.activate(ctx, u, have); err != nil {
			return err
		}
		as.Read(func(st *domain.State) { have, _ = st.Authority(id) })
	}
	if rotation.MayTakeOffline(have, as.own.id) {
		return nil // still without quorum
	}
	as.local.change(func(v local.View) local.View { return v.WithoutAuthority(u.of) })
	if !ca.Signs(have.GetPhase()) {
		as.log.Error("what this node took into use without quorum was given up by the cluster meanwhile: what it signed is void, or issued anew",
			"authority", id, "use", u.name, "phase", ca.PhaseName(have.GetPhase()))
	}
	as.applied.tell()
	return nil
}
