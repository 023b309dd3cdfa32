package domain

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/federation/catalog"
)

// FeatureLevel is which commands this release carries out: all of this level and below.
// Every member announces its own. A command above the level of the cluster, which is the
// lowest that all members have had together, is refused by the rules, and must not get
// into a log at all (Admits): a member that does not know it would stop.
//
//	1  everything before levels
//	2  StageObjects, ApplyStaged
//	3  MergeBans; administrators: Command.principal, RoleBinding; hosts: AdmitAgent, selectors, scope
//	4  Service.protocol, Import.port, Import.protocol
//	5  Service.edge, Service.http; Cluster.hardened_at; Authority.proof, ForeignBundle.as_fetched; stricter rules of Apply: each asks hardened()
//	6  StoreForeignBundle.given, ResetForeignBundle; Relationship.endpoint_urls with a query
const FeatureLevel = 6

// levelHardened is the first level at which the stricter rules of Apply hold. Below it
// Apply decides as the release before did, since every member must decide alike.
const levelHardened = 5

// hardened reports whether the stricter rules of Apply hold.
func (s *State) hardened() bool { return s.FeatureLevel() >= levelHardened }

// levelGiven is the first level at which a bundle that is given by hand counts again when it
// is changed.
const levelGiven = 6

// TakesGiven reports whether a bundle that is given by hand counts whenever it is changed,
// not only as the first one.
func (s *State) TakesGiven() bool { return s.FeatureLevel() >= levelGiven }

func levelOfObjects(c *statev1.ApplyObjects, least uint32) uint32 {
	for _, o := range c.GetUpserts() {
		least = max(least, catalog.Level(o))
	}
	return least
}

// FeatureLevel is the cluster's. It never falls: what was agreed at a level is in the
// log and in snapshots.
func (s *State) FeatureLevel() uint32 { return max(s.Cluster().GetFeatureLevel(), 1) }

// Admits says why a command cannot be agreed in this state because of the software of
// the members; nil if it can. Who proposes asks before it does.
func (s *State) Admits(cmd *statev1.Command) *Refusal {
	needs := levelOf(cmd)
	if needs <= s.FeatureLevel() {
		return nil
	}
	var behind []string
	for _, m := range s.members.rows {
		if levelOfMember(m) < needs {
			behind = append(behind, m.GetName())
		}
	}
	slices.Sort(behind)
	if len(behind) == 0 {
		return refuse(CodeFeature, "the cluster is at feature level %d, this needs %d: wait until all CA nodes have said that they are upgraded", s.FeatureLevel(), needs)
	}
	return refuse(CodeFeature, "this needs feature level %d of every CA node, and %s: upgrade what is behind, or remove it", needs, verb(behind))
}

func verb(behind []string) string {
	if len(behind) == 1 {
		return behind[0] + " is behind"
	}
	return strings.Join(behind, ", ") + " are behind"
}

func levelOfMember(m *statev1.Member) uint32 { return max(m.GetFeatureLevel(), 1) }

// tooOld refuses a member whose software does not know what was agreed already.
func (s *State) tooOld(m *statev1.Member) *Refusal {
	if have := levelOfMember(m); have < s.FeatureLevel() {
		return refuse(CodeFeature, "member %s has feature level %d, and the cluster uses %d: install the release of the other CA nodes", m.GetName(), have, s.FeatureLevel())
	}
	return nil
}

// raiseLevel follows a change of the members.
func (a *application) raiseLevel() {
	lowest := uint32(0)
	for _, m := range a.members.rows {
		if level := levelOfMember(m); lowest == 0 || level < lowest {
			lowest = level
		}
	}
	if lowest <= a.FeatureLevel() {
		return
	}
	cluster := proto.CloneOf(a.Cluster())
	if cluster.FeatureLevel = lowest; !a.hardened() && lowest >= levelHardened {
		cluster.HardenedAt = a.rev
	}
	put(a, &a.cluster, "", cluster)
	a.changed(ChangeCluster, "")
}
