// Package rotation decides when an authority may go on to its next phase: when it is
// ready to sign (I3), when nobody rests on it any more, and when its node is to take the
// next one into use.
//
// Pure: what members say of their subscribers, and the time, are arguments. The leader
// asks for the gate, each node for its own schedule.
package rotation

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
)

// Report is a member's word on its subscribers.
type Report struct {
	Applied      uint64   // revision of the member's own state
	Acknowledged uint64   // minimum over its subscribers, a revision
	WaitingFor   []Behind // who does not hold everything, the furthest behind first
	Settled      bool     // false: it started a moment ago, its subscribers are still coming back
	// Held is who has SVIDs under TAINTED authorities, by authority id.
	Held map[string][]string
}

// Behind is a subscriber that does not hold everything.
type Behind struct {
	Name string
	Held uint64 // revision
}

// Reports gives the fresh report of a member; false if there is none.
type Reports func(memberID string) (Report, bool)

// View is what the gate is decided from.
type View struct {
	Pending []*statev1.Authority // PREPARED and not ready
	Tainted []*statev1.Authority // TAINTED and not drained

	now     time.Time // agreed
	phase   time.Duration
	hint    time.Duration // how often other domains fetch the bundle
	members []*statev1.Member
	peers   []string // trust domains
	active  map[ownedBy]*statev1.Authority
	longest Longest
}

type ownedBy struct {
	member string
	use    statev1.KeyUse
}

// Longest is the longest life of anything that the domain issues, by the use of the
// authority that it is issued under.
type Longest map[statev1.KeyUse]time.Duration

// LongestOf is known for X.509; of tokens it is the most that any entry may have.
func LongestOf(st *domain.State) Longest {
	phase := st.Lifetimes().Phase
	return Longest{
		statev1.KeyUse_KEY_USE_X509: st.LongestLeaf(),
		statev1.KeyUse_KEY_USE_JWT:  min(ca.MaxJWTSVID, phase),
		statev1.KeyUse_KEY_USE_WIT:  min(ca.MaxWITSVID, phase),
	}
}

// Look reads the state.
func Look(st *domain.State) View {
	v := View{now: st.Now(), active: map[ownedBy]*statev1.Authority{}, longest: LongestOf(st)}
	for _, a := range st.Authorities() {
		switch {
		case a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_PREPARED && !a.GetReady():
			v.Pending = append(v.Pending, a)
		case a.GetPhase() == statev1.AuthorityPhase_AUTHORITY_PHASE_TAINTED && !a.GetDrained():
			v.Tainted = append(v.Tainted, a)
		case ca.Signs(a.GetPhase()):
			v.active[ownedBy{a.GetMemberId(), a.GetUse()}] = a
		}
	}
	if len(v.Pending)+len(v.Tainted) > 0 {
		v.members, v.peers = st.Members(), st.Peers()
		v.phase, v.hint = st.Lifetimes().Phase, st.Lifetimes().RefreshHint
	}
	return v
}

// silent says why a member's word does not count now; empty if it does.
func silent(m *statev1.Member, reports Reports) (Report, string) {
	r, ok := reports(m.GetId())
	switch {
	case !ok:
		return r, "CA node " + m.GetName() + " does not report"
	case !r.Settled:
		return r, "CA node " + m.GetName() + " started a moment ago"
	}
	return r, ""
}

// refreshHints is how many of our refresh hints another domain is given to fetch the
// bundle.
const refreshHints = 3

// WaitingFor says who may not hold a PREPARED authority yet, and who cannot say and is
// assumed to. A member that does not report counts, for nobody knows what its
// subscribers hold, unless the operator excludes it by name. Other domains are assumed
// to hold it three of our refresh hints after it was published, by the agreed time: it
// goes on when the leader changes.
func (v View) WaitingFor(a *statev1.Authority, reports Reports, excluded ...string) (waiting, assumed []string) {
	for _, m := range v.members {
		report, why := silent(m, reports)
		switch {
		case why != "" && slices.Contains(excluded, m.GetName()):
			assumed = append(assumed, "CA node "+m.GetName()+" (excluded)")
		case why != "":
			waiting = append(waiting, why)
		case report.Acknowledged < a.GetPreparedRevision():
			waiting = append(waiting, lacking(a, report, m.GetName()))
		}
	}
	for _, td := range v.peers {
		if v.inPhase(a) < refreshHints*v.hint {
			waiting = append(waiting, "domain "+td)
		} else {
			assumed = append(assumed, "domain "+td)
		}
	}
	return waiting, assumed
}

// lacking names a member's subscribers that do not hold an authority.
func lacking(a *statev1.Authority, r Report, member string) string {
	var names []string
	for _, b := range r.WaitingFor {
		if b.Held < a.GetPreparedRevision() {
			names = append(names, b.Name)
		}
	}
	return fmt.Sprintf("%s (at CA node %s)", cmp.Or(strings.Join(names, ", "), "somebody"), member)
}

// MayExclude says why a member cannot be excluded from the gate, nil if it can: only of
// one that does not speak is not known who waits.
func (v View) MayExclude(name string, reports Reports) error {
	for _, m := range v.members {
		if m.GetName() != name {
			continue
		}
		if _, why := silent(m, reports); why == "" {
			return fmt.Errorf("CA node %s does report: whoever is waited for there is known, and cannot be excluded", name)
		}
		return nil
	}
	return fmt.Errorf("no CA node is named %.64s", name)
}

// inPhase is for how long the authority has been in its phase, by the agreed time.
func (v View) inPhase(a *statev1.Authority) time.Duration {
	if a.GetSince() == 0 || v.now.IsZero() {
		return 0
	}
	return v.now.Sub(time.Unix(a.GetSince(), 0))
}

// left is how long the authority that this one will replace has to live; false if there
// is none.
func (v View) left(a *statev1.Authority) (time.Duration, bool) {
	active := v.active[ownedBy{a.GetMemberId(), a.GetUse()}]
	if active == nil || v.now.IsZero() {
		return 0, false
	}
	return time.Unix(active.GetNotAfter(), 0).Sub(v.now), true
}

// Overdue: by schedule the authority would be in use by now, and somebody does not hold
// it. There is a phase left to mend that.
func (v View) Overdue(a *statev1.Authority) bool {
	left, ok := v.left(a)
	return ok && left < v.phase
}

// LeaveBehind: one silent agent cannot stop rotation. Stragglers are waited for while
// the authority in use can still sign leaves of full length.
func (v View) LeaveBehind(a *statev1.Authority) bool {
	longest := v.longest[a.GetUse()]
	left, ok := v.left(a)
	return ok && left < longest+longest/4
}

// Holding says who has SVIDs under a TAINTED authority, and which members cannot tell. A
// member's word counts only when it has applied the taint: from then on its own
// authority signs no more, and its subscribers are asked. A JWT-SVID is with whoever it
// was shown to and cannot be called back: it is waited for until its end.
func (v View) Holding(a *statev1.Authority, reports Reports) (holding, silentMembers []string) {
	for _, m := range v.members {
		report, why := silent(m, reports)
		switch {
		case why != "":
			silentMembers = append(silentMembers, why)
		case report.Applied < a.GetRevision():
			silentMembers = append(silentMembers, "CA node "+m.GetName()+" lags behind")
		default:
			holding = append(holding, report.Held[a.GetId()]...)
		}
	}
	if a.GetUse() == statev1.KeyUse_KEY_USE_JWT && a.GetReady() && !v.Ended(a) {
		holding = append(holding, fmt.Sprintf("JWT-SVIDs until %s", time.Unix(a.GetSince(), 0).Add(v.longest[a.GetUse()]).UTC().Format(time.TimeOnly)))
	}
	slices.Sort(holding)
	return slices.Compact(holding), silentMembers
}

// Ended: everything that a TAINTED authority signed has ended by itself, whatever
// anybody says.
func (v View) Ended(a *statev1.Authority) bool { return v.inPhase(a) > v.longest[a.GetUse()] }
