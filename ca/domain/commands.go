package domain

import (
	"fmt"
	"strings"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/selector"
)

// Forwarding is from which CA nodes the leader takes a command.
type Forwarding uint8

// From whom the leader takes a command.
const (
	LeaderOnly Forwarding = iota // it alone proposes it
	Proven                       // any: it proves itself, was verified at the door, or only takes away
	// Asked: any, for somebody who asked there. That he did, that node alone knows; what it
	// gains if nobody did stands in the log under its own id.
	Asked
	OfItself // the one that it is about
)

type command = *statev1.Command

// descriptor is all that rules and doors know of one command.
type descriptor struct {
	apply    func(*application, command) *Refusal
	forward  Forwarding
	level    func(command) uint32                   // the first feature level that carries it out; nil: the first one
	about    func(command) []string                 // what it is done to, for the audit log
	member   func(command) string                   // id of the CA node that it is about; nil: it is about none
	admits   func(*State, command) *Refusal         // why it would not admit a host or a CA node now; nil: it admits none
	approved func(command) bool                     // whether it changes the CA nodes and may need approvals; nil: no
	may      func(*Administrator, command) *Refusal // why an administrator may not have it carried out; nil: that takes Govern
}

// describe is the one table of commands; false for one that this release does not know.
// What has no row here is refused to everybody.
func describe(cmd command) (descriptor, bool) {
	switch cmd.GetBody().(type) {
	case *statev1.Command_Init:
		return descriptor{apply: func(a *application, c command) *Refusal { return a.init(c.GetInit()) }}, true
	case *statev1.Command_Tick:
		return descriptor{apply: func(a *application, c command) *Refusal { return a.tick(c.GetTick()) }}, true
	case *statev1.Command_Checksum:
		return descriptor{apply: func(a *application, c command) *Refusal { a.compare(c.GetChecksum()); return nil }}, true

	// CA nodes and their authorities.
	case *statev1.Command_JoinMember:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.joinMember(c.GetJoinMember()) },
			forward: Proven,
			about: func(c command) []string {
				return []string{"token/" + c.GetJoinMember().GetTokenId(), "node/" + c.GetJoinMember().GetMember().GetId()}
			},
			admits: func(s *State, c command) *Refusal { _, _, refusal := s.joining(c.GetJoinMember()); return refusal },
		}, true
	case *statev1.Command_UpdateMember:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.updateMember(c.GetUpdateMember()) },
			forward: OfItself,
			about:   func(c command) []string { return []string{"node/" + c.GetUpdateMember().GetId()} },
			member:  func(c command) string { return c.GetUpdateMember().GetId() },
		}, true
	case *statev1.Command_RemoveMember:
		return descriptor{
			apply:    func(a *application, c command) *Refusal { return a.removeMember(c.GetRemoveMember()) },
			forward:  Asked,
			about:    func(c command) []string { return []string{"node/" + c.GetRemoveMember().GetId()} },
			approved: always,
		}, true
	case *statev1.Command_PromoteMember:
		return descriptor{
			apply:    func(a *application, c command) *Refusal { return a.promoteMember(c.GetPromoteMember()) },
			forward:  Asked,
			about:    func(c command) []string { return []string{"node/" + c.GetPromoteMember().GetId()} },
			approved: always,
		}, true
	case *statev1.Command_ApproveChange:
		return descriptor{
			apply: func(a *application, c command) *Refusal {
				return a.approveChange(c.GetApproveChange(), c.GetActor())
			},
			forward: Proven,
			level:   hardenedOnly,
		}, true
	case *statev1.Command_ReplaceRecoveryKey:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.replaceRecoveryKey(c.GetReplaceRecoveryKey()) },
			forward: Proven,
			level:   hardenedOnly,
			about: func(c command) []string {
				return []string{"recovery key " + ca.RecoveryKeyText(c.GetReplaceRecoveryKey().GetReplacement().GetNext())}
			},
			// The former key speaks for itself.
			approved: func(c command) bool { return len(c.GetReplaceRecoveryKey().GetReplacement().GetSignature()) == 0 },
		}, true
	case *statev1.Command_PrepareAuthority:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.prepareAuthority(c.GetPrepareAuthority()) },
			forward: OfItself,
			level: func(c command) uint32 {
				if len(c.GetPrepareAuthority().GetAuthority().GetProof()) > 0 {
					return levelHardened
				}
				return 1
			},
			about: func(c command) []string {
				return []string{"authority/" + c.GetPrepareAuthority().GetAuthority().GetId()}
			},
			member: func(c command) string { return c.GetPrepareAuthority().GetAuthority().GetMemberId() },
		}, true
	case *statev1.Command_AuthorityReady:
		return descriptor{
			apply: func(a *application, c command) *Refusal { return a.authorityReady(c.GetAuthorityReady()) },
			about: func(c command) []string {
				return withoutWord(c.GetAuthorityReady().GetId(), c.GetAuthorityReady().GetAssumed())
			},
		}, true
	case *statev1.Command_ActivateAuthority:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.activateAuthority(c.GetActivateAuthority()) },
			forward: Asked,
			about:   func(c command) []string { return []string{"authority/" + c.GetActivateAuthority().GetId()} },
		}, true
	case *statev1.Command_TaintAuthority:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.taintAuthority(c.GetTaintAuthority()) },
			forward: Asked,
			about:   func(c command) []string { return []string{"authority/" + c.GetTaintAuthority().GetId()} },
		}, true
	case *statev1.Command_AuthorityDrained:
		return descriptor{
			apply: func(a *application, c command) *Refusal { return a.authorityDrained(c.GetAuthorityDrained()) },
			about: func(c command) []string {
				return withoutWord(c.GetAuthorityDrained().GetId(), c.GetAuthorityDrained().GetAssumed())
			},
		}, true
	case *statev1.Command_RevokeAuthority:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.revokeAuthority(c.GetRevokeAuthority()) },
			forward: Asked,
			about:   func(c command) []string { return []string{"authority/" + c.GetRevokeAuthority().GetId()} },
		}, true

	// Tokens, hosts and entries.
	case *statev1.Command_CreateToken:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.createToken(c.GetCreateToken()) },
			forward: Asked,
			level: func(c command) uint32 {
				if grant := c.GetCreateToken().GetToken().GetAgent(); len(grant.GetSelectors())+len(grant.GetPathPrefixes()) > 0 {
					return 3
				}
				return 1
			},
			about:    func(c command) []string { return []string{"token/" + c.GetCreateToken().GetToken().GetId()} },
			approved: func(c command) bool { return c.GetCreateToken().GetToken().GetNode() != nil },
		}, true
	case *statev1.Command_RevokeToken:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.revokeToken(c.GetRevokeToken()) },
			forward: Asked,
			about:   func(c command) []string { return []string{"token/" + c.GetRevokeToken().GetId()} },
		}, true
	case *statev1.Command_AttestAgent:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.attestAgent(c.GetAttestAgent()) },
			forward: Proven,
			about: func(c command) []string {
				return []string{"token/" + c.GetAttestAgent().GetTokenId(), "key/" + c.GetAttestAgent().GetKeyId()}
			},
			admits: func(s *State, c command) *Refusal { _, _, refusal := s.attesting(c.GetAttestAgent()); return refusal },
		}, true
	case *statev1.Command_AdmitAgent:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.admitAgent(c.GetAdmitAgent()) },
			forward: Proven,
			level:   func(command) uint32 { return 3 },
			about: func(c command) []string {
				host := c.GetAdmitAgent().GetAgent()
				return []string{"agent/" + host.GetName(), "certificate/" + host.GetCertificate()}
			},
			admits: func(s *State, c command) *Refusal { _, refusal := s.admitting(c.GetAdmitAgent()); return refusal },
		}, true
	case *statev1.Command_BanAgent:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.banAgent(c.GetBanAgent()) },
			forward: Asked,
			about:   func(c command) []string { return []string{"agent/" + c.GetBanAgent().GetName()} },
		}, true
	case *statev1.Command_EvictAgent:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.evictAgent(c.GetEvictAgent()) },
			forward: Asked,
			about:   func(c command) []string { return []string{"agent/" + c.GetEvictAgent().GetName()} },
		}, true
	case *statev1.Command_MergeBans:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.mergeBans(c.GetMergeBans()) },
			forward: Proven,
			level:   func(command) uint32 { return 3 },
			about: func(c command) (on []string) {
				for _, b := range c.GetMergeBans().GetBans() {
					on = append(on, "agent/"+b.GetAgent().GetName())
				}
				return on
			},
		}, true
	case *statev1.Command_ChangeEntries:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.changeEntries(c.GetChangeEntries()) },
			forward: Asked,
			level:   levelOfEntries,
			about: func(c command) (on []string) {
				for _, change := range c.GetChangeEntries().GetChanges() {
					on = append(on, change.GetCreate().GetId()+change.GetUpdate().GetId()+change.GetDelete())
				}
				return on
			},
			may: (*Administrator).mayChangeEntries,
		}, true

	// The catalogue, and what other domains say.
	case *statev1.Command_ApplyObjects:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.applyObjects(c.GetApplyObjects()) },
			forward: Asked,
			level:   func(c command) uint32 { return levelOfObjects(c.GetApplyObjects(), 1) },
			about: func(c command) (on []string) {
				for _, o := range c.GetApplyObjects().GetUpserts() {
					on = append(on, ObjectKey(o))
				}
				for _, key := range c.GetApplyObjects().GetDeletes() {
					on = append(on, "delete "+key.GetKind()+"/"+key.GetName())
				}
				return on
			},
			may: func(admin *Administrator, c command) *Refusal { return admin.mayApply(c.GetApplyObjects()) },
		}, true
	case *statev1.Command_StageObjects:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.stageObjects(c.GetStageObjects()) },
			forward: Asked,
			level:   func(c command) uint32 { return levelOfObjects(c.GetStageObjects().GetObjects(), 2) },
			may:     (*Administrator).mayStage,
		}, true
	case *statev1.Command_ApplyStaged:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.applyStaged(c.GetApplyStaged()) },
			forward: Asked,
			level:   func(command) uint32 { return 2 },
			may:     (*Administrator).mayApplyStaged,
		}, true
	case *statev1.Command_StoreForeignBundle:
		return descriptor{
			apply: func(a *application, c command) *Refusal { return a.storeForeignBundle(c.GetStoreForeignBundle()) },
			level: func(c command) uint32 {
				if c.GetStoreForeignBundle().GetGiven() {
					return levelGiven
				}
				return 1
			},
			about: func(c command) []string { return []string{"bundle/" + c.GetStoreForeignBundle().GetTrustDomain()} },
		}, true
	case *statev1.Command_ResetForeignBundle:
		return descriptor{
			apply:   func(a *application, c command) *Refusal { return a.resetForeignBundle(c.GetResetForeignBundle()) },
			forward: Asked,
			level:   func(command) uint32 { return levelGiven },
			about: func(c command) []string {
				r := c.GetResetForeignBundle()
				return []string{"bundle/" + r.GetTrustDomain(), "sha256/" + r.GetSha256()}
			},
		}, true
	}
	return descriptor{}, false
}

func always(command) bool { return true }

func hardenedOnly(command) uint32 { return levelHardened }

// withoutWord names an authority, and those who are assumed to agree.
func withoutWord(id string, assumed []string) []string {
	on := []string{"authority/" + id}
	for _, who := range assumed {
		on = append(on, "assumed: "+who)
	}
	return on
}

func levelOfEntries(c command) uint32 {
	level := uint32(1)
	for _, change := range c.GetChangeEntries().GetChanges() {
		for _, e := range []*statev1.Entry{change.GetCreate(), change.GetUpdate()} {
			if level = max(level, selector.Level(e.GetSelectors())); len(e.GetNodeSelectors()) > 0 {
				level = max(level, 3)
			}
		}
	}
	return level
}

// levelOf is the first level that carries a command out.
func levelOf(cmd command) (level uint32) {
	level = 1
	if cmd.GetPrincipal() != "" {
		level = 3
	}
	if d, _ := describe(cmd); d.level != nil {
		level = max(level, d.level(cmd))
	}
	return level
}

// ForwardingOf is from which CA nodes the leader takes a command, and the one that it is
// about, by id; empty: it is about none.
func ForwardingOf(cmd command) (from Forwarding, member string) {
	d, _ := describe(cmd)
	if d.member != nil {
		member = d.member(cmd)
	}
	return d.forward, member
}

// AdmitsSomebody tells whether a command admits a host or a CA node.
func AdmitsSomebody(cmd command) bool {
	d, _ := describe(cmd)
	return d.admits != nil
}

// ChangesMembers tells whether a command is a change that may need approvals.
func ChangesMembers(cmd command) bool {
	d, _ := describe(cmd)
	return d.approved != nil && d.approved(cmd)
}

// About names a command and what it is done to.
func About(cmd command) (what string, on []string) {
	if change := MembershipChange(cmd.GetApproveChange().GetChange()); change != nil {
		what, on = About(change)
		return "Approve" + what, on
	}
	what = strings.TrimPrefix(fmt.Sprintf("%T", cmd.GetBody()), "*statev1.Command_")
	if d, _ := describe(cmd); d.about != nil {
		on = d.about(cmd)
	}
	return what, on
}
