package ca

import (
	"errors"
	"fmt"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// The phases of an authority. PREPARED, ACTIVE and RETIRED have equal length; TAINTED
// can be reached from any of them, and REVOKED from TAINTED, in an emergency from any.
//
//	PREPARED ──ready──▶ ACTIVE ──▶ RETIRED ──▶ (expires)
//	    └───────────────┴───┬────────┘
//	                     TAINTED ──▶ REVOKED

// MayMove tells whether an authority may go from one phase to another. Whether a
// PREPARED one may become ACTIVE depends on the ready gate as well (MayActivate).
// PREPARED to RETIRED happens when its member leaves.
func MayMove(from, to statev1.AuthorityPhase) bool {
	switch to {
	case statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE:
		return from == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED
	case statev1.AuthorityPhase_AUTHORITY_PHASE_RETIRED:
		return from == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED || from == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
	case statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED:
		return InBundle(from) && from != to
	case statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED:
		return InBundle(from)
	}
	return false
}

// MayRevoke says why an authority may not be revoked now, nil if it may. now is the
// operator's word that whoever holds an SVID under it loses it.
func MayRevoke(a *statev1.Authority, now bool) error {
	switch {
	case a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_REVOKED:
		return errors.New("authority is REVOKED already")
	case now:
		return nil
	case a.GetPhase() != statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED:
		return fmt.Errorf("authority is %s, not TAINTED: taint it first, so that what it signed is issued anew before it leaves the bundle", PhaseName(a.GetPhase()))
	case !a.GetDrained():
		return errors.New("SVIDs under the authority are still in use")
	}
	return nil
}

// MayActivate says why an authority may not sign at the time now, nil if it may. The
// zero time skips the check of its validity.
func MayActivate(a *statev1.Authority, now time.Time) error {
	switch {
	case !MayMove(a.GetPhase(), statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE):
		return fmt.Errorf("authority is %s, not PREPARED", PhaseName(a.GetPhase()))
	case !a.GetReady():
		return fmt.Errorf("authority has not passed the ready gate: not everybody holds it yet")
	case !now.IsZero() && now.Unix() >= a.GetNotAfter():
		return fmt.Errorf("authority ended at %s", time.Unix(a.GetNotAfter(), 0).UTC().Format(time.RFC3339))
	}
	return nil
}

// InBundle tells whether an authority of that phase stands in the domain's bundle.
// A TAINTED one does until everything under it is re-issued.
func InBundle(phase statev1.AuthorityPhase) bool {
	switch phase {
	case statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED,
		statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE,
		statev1.AuthorityPhase_AUTHORITY_PHASE_RETIRED,
		statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED:
		return true
	}
	return false
}

// Signs tells whether an authority of that phase signs.
func Signs(phase statev1.AuthorityPhase) bool {
	return phase == statev1.AuthorityPhase_AUTHORITY_PHASE_ACTIVE
}

// PhaseName is the phase as people write it: PREPARED.
func PhaseName(phase statev1.AuthorityPhase) string {
	const prefix = "AUTHORITY_PHASE_"
	if s := phase.String(); len(s) > len(prefix) && s[:len(prefix)] == prefix {
		return s[len(prefix):]
	}
	return phase.String()
}
