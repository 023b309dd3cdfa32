package server

import (
	"fmt"
	"slices"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/nodeattest"
	"github.com/entente-mesh/entente/ca/roles"
)

// method is all that the doors know of one method.
type method struct {
	callers []class     // who may call it; others may not
	right   roles.Right // lets an administrator call it as well; 0: he may not. What See lets through looks at its request itself.
	records recording
	about   func(on *naming, req, resp any) // what a call is about, for the audit log; nil: what its request names
}

func (m method) admits(c class) bool {
	return slices.Contains(m.callers, c) || c == administrator && m.right != 0
}

// recording is which calls of a method have a line in the audit log.
type recording uint8

const (
	recordsNothing  recording = iota
	recordsRefusals           // it changes nothing, and gives nothing away that no role is needed for
	recordsAll
)

var (
	members    = []class{member}
	operators  = []class{local}
	hosts      = []class{agent}
	followers  = []class{agent, subscriber}
	whoAttests = []class{anonymous, agent}
)

// shows is a method of Admin that an administrator with this right may call.
func shows(right roles.Right) method {
	return method{callers: operators, right: right, records: recordsRefusals}
}

// acts is one that changes something; right 0: it is for operators alone.
func acts(right roles.Right, about func(on *naming, req, resp any)) method {
	return method{callers: operators, right: right, records: recordsAll, about: about}
}

// methods has a row for each method. One without a row is refused to everybody.
var methods = map[string]method{
	ententev1.Join_Join_FullMethodName:     {callers: []class{stranger, member}, records: recordsAll, about: of(aboutJoin)},
	ententev1.Attest_Attest_FullMethodName: {callers: whoAttests, records: recordsAll, about: of(aboutAttest)},

	ententev1.Sync_Sync_FullMethodName:         {callers: followers},
	ententev1.Compare_Statement_FullMethodName: {callers: []class{anonymous, stranger, member, agent, workload}},
	ententev1.Compare_Denials_FullMethodName:   {callers: followers},
	ententev1.Sign_SignX509_FullMethodName:     {callers: hosts},
	ententev1.Sign_SignJWT_FullMethodName:      {callers: hosts},
	ententev1.Sign_SignWIT_FullMethodName:      {callers: hosts},

	ententev1.Peer_Propose_FullMethodName:   {callers: members},
	ententev1.Peer_Report_FullMethodName:    {callers: members},
	ententev1.Peer_Presence_FullMethodName:  {callers: members},
	ententev1.Peer_Checksum_FullMethodName:  {callers: members},
	ententev1.Peer_Nodes_FullMethodName:     {callers: members},
	ententev1.Peer_Vouch_FullMethodName:     {callers: members},
	ententev1.Peer_Gate_FullMethodName:      {callers: members},
	ententev1.Peer_MarkReady_FullMethodName: {callers: members},
	ententev1.Peer_Followed_FullMethodName:  {callers: members},
	ententev1.Peer_ShowEpoch_FullMethodName: {callers: []class{anonymous, stranger, member}},

	ententev1.Admin_Status_FullMethodName:          shows(roles.See),
	ententev1.Admin_GetBundle_FullMethodName:       shows(roles.See),
	ententev1.Admin_ListObjects_FullMethodName:     shows(roles.See),
	ententev1.Admin_ListEntries_FullMethodName:     shows(roles.See),
	ententev1.Admin_GetEntry_FullMethodName:        shows(roles.See),
	ententev1.Admin_CountEntries_FullMethodName:    shows(roles.See),
	ententev1.Admin_ListNodes_FullMethodName:       shows(roles.SeeAll),
	ententev1.Admin_ListAuthorities_FullMethodName: shows(roles.SeeAll),
	ententev1.Admin_ListAgents_FullMethodName:      shows(roles.SeeAll),
	ententev1.Admin_GetAgent_FullMethodName:        shows(roles.SeeAll),
	ententev1.Admin_ListTokens_FullMethodName:      shows(roles.SeeAll),
	ententev1.Admin_ListChanges_FullMethodName:     shows(roles.SeeAll),
	ententev1.Admin_WhoAmI_FullMethodName:          {callers: []class{local, workload}, records: recordsRefusals},

	ententev1.Admin_Apply_FullMethodName:              acts(roles.See, of(aboutApply)),
	ententev1.Admin_ChangeEntries_FullMethodName:      acts(roles.See, of(aboutEntries)),
	ententev1.Admin_CreateToken_FullMethodName:        acts(roles.Govern, of(aboutToken)),
	ententev1.Admin_RevokeToken_FullMethodName:        acts(roles.Govern, of(aboutRevokedToken)),
	ententev1.Admin_BanAgent_FullMethodName:           acts(roles.Govern, of(aboutAgent)),
	ententev1.Admin_EvictAgent_FullMethodName:         acts(roles.Govern, of(aboutAgent)),
	ententev1.Admin_IsolateAgent_FullMethodName:       acts(roles.Govern, of(aboutIsolation)),
	ententev1.Admin_PrepareAuthority_FullMethodName:   acts(roles.Govern, of(aboutNewAuthority)),
	ententev1.Admin_ActivateAuthority_FullMethodName:  acts(roles.Govern, of(aboutAuthority)),
	ententev1.Admin_TaintAuthority_FullMethodName:     acts(roles.Govern, of(aboutAuthority)),
	ententev1.Admin_RevokeAuthority_FullMethodName:    acts(roles.Govern, of(aboutAuthority)),
	ententev1.Admin_RemoveNode_FullMethodName:         acts(roles.Govern, of(aboutRemoval)),
	ententev1.Admin_PromoteNode_FullMethodName:        acts(roles.Govern, of(aboutPromotion)),
	ententev1.Admin_SaveSnapshot_FullMethodName:       acts(roles.Govern, nil),
	ententev1.Admin_ResetFederation_FullMethodName:    acts(roles.Govern, of(aboutReset)),
	ententev1.Admin_RefreshFederation_FullMethodName:  acts(roles.Govern, of(aboutRefresh)),
	ententev1.Admin_ApproveChange_FullMethodName:      acts(0, of(aboutApproval)),
	ententev1.Admin_ReplaceRecoveryKey_FullMethodName: acts(0, nil),
}

// Bounds of what one act's line names, which may be what its caller made up.
const (
	maxNamed   = 1000 // things
	maxRefused = 20   // things of an act whose caller may not do it
	maxName    = 512  // bytes of one
)

// naming collects what a call is about.
type naming struct {
	on   []string
	most int
}

func (n *naming) add(kind, key string) {
	switch {
	case len(n.on) < n.most:
		n.on = append(n.on, fmt.Sprintf("%.*s", maxName, kind+key))
	case len(n.on) == n.most:
		n.on = append(n.on, "and more")
	}
}

// named is what a call is about, most things at most. Without an answer resp is nil.
func (m method) named(req, resp any, most int) []string {
	on := &naming{most: most}
	if m.about != nil {
		m.about(on, req, resp)
		return on.on
	}
	switch r := req.(type) {
	case interface{ GetName() string }:
		on.add("", r.GetName())
	case interface{ GetId() string }:
		on.add("", r.GetId())
	}
	return on.on
}

// of gives the messages their types. The answer is nil where there is none.
func of[Req, Resp any](about func(on *naming, req *Req, resp *Resp)) func(*naming, any, any) {
	return func(on *naming, req, resp any) {
		if r, ok := req.(*Req); ok {
			answer, _ := resp.(*Resp)
			about(on, r, answer)
		}
	}
}

func aboutJoin(on *naming, r *ententev1.JoinRequest, done *ententev1.JoinResponse) {
	on.add("token/", r.GetTokenId())
	if done != nil {
		on.add("node/", done.GetMember().GetName())
	}
}

func aboutAttest(on *naming, r *ententev1.AttestRequest, done *ententev1.AttestResponse) {
	if r.GetTokenId() != "" {
		on.add("token/", r.GetTokenId())
	}
	if shown := nodeattest.Evidence(r); shown != "" {
		on.add("", shown)
	}
	if done != nil {
		on.add("agent/", done.GetAgent().GetName())
	}
}

func aboutToken(on *naming, r *ententev1.CreateTokenRequest, done *ententev1.CreateTokenResponse) {
	if r.GetNode() != nil {
		on.add("node/", r.GetNode().GetName())
	} else {
		on.add("agent/", r.GetAgent().GetName())
	}
	if done != nil {
		on.add("token/", done.GetId())
	}
}

func aboutRevokedToken(on *naming, r *ententev1.RevokeTokenRequest, _ *ententev1.RevokeTokenResponse) {
	on.add("token/", r.GetId())
}

func aboutReset(on *naming, r *ententev1.ResetFederationRequest, _ *ententev1.ResetFederationResponse) {
	on.add("bundle/", r.GetTrustDomain())
	on.add("sha256/", r.GetBundleSha256())
}

func aboutRefresh(on *naming, r *ententev1.RefreshFederationRequest, done *ententev1.RefreshFederationResponse) {
	if done == nil {
		on.add("bundle/", r.GetTrustDomain())
	}
	for _, b := range done.GetBundles() {
		on.add("bundle/", b.GetTrustDomain())
	}
}

func aboutApply(on *naming, r *ententev1.ApplyRequest, done *ententev1.ApplyResponse) {
	for _, change := range done.GetChanges() {
		if change.GetAction() != "unchanged" {
			on.add(change.GetAction()+" ", change.GetKey().GetKind()+"/"+change.GetKey().GetName())
		}
	}
	if done != nil {
		return
	}
	for _, o := range r.GetObjects() {
		on.add("", domain.ObjectKey(o))
	}
	for _, key := range r.GetDeletes() {
		on.add("delete ", key.GetKind()+"/"+key.GetName())
	}
}

// aboutEntries names what became of entries, of refusals a few: whoever is refused could
// make up as many as he likes.
func aboutEntries(on *naming, _ *ententev1.ChangeEntriesRequest, done *ententev1.ChangeEntriesResponse) {
	refused := 0
	for _, result := range done.GetResults() {
		if result.GetError() == "" {
			on.add(result.GetAction()+" ", result.GetId())
		} else if refused++; refused <= maxRefused {
			on.add("refused ", result.GetId()+": "+result.GetError())
		}
	}
	if more := refused - maxRefused; more > 0 {
		on.on = append(on.on, fmt.Sprintf("refused %d more", more))
	}
}

func aboutAgent(on *naming, r *ententev1.ChangeAgentRequest, _ *ententev1.ChangeAgentResponse) {
	on.add("agent/", r.GetName())
}

func aboutIsolation(on *naming, r *ententev1.IsolateAgentRequest, _ *ententev1.IsolateAgentResponse) {
	on.add("agent/", r.GetName())
	on.add("reason: ", fmt.Sprintf("%.*s", maxReason, r.GetReason()))
}

func aboutNewAuthority(on *naming, _ *ententev1.PrepareAuthorityRequest, done *ententev1.ChangeAuthorityResponse) {
	if done != nil {
		on.add("authority/", done.GetAuthority().GetId())
	}
}

func aboutAuthority(on *naming, r *ententev1.ChangeAuthorityRequest, done *ententev1.ChangeAuthorityResponse) {
	if r.GetNow() {
		on.add("", "now")
	}
	for _, node := range r.GetExclude() {
		on.add("without the word of node/", node)
	}
	on.add("authority/", r.GetId())
	for _, who := range done.GetHeldBy() {
		on.add("held by ", who)
	}
}

func aboutRemoval(on *naming, r *ententev1.RemoveNodeRequest, _ *ententev1.RemoveNodeResponse) {
	on.add("node/", r.GetName())
	if r.GetCompromised() {
		on.add("", "compromised")
	}
}

func aboutPromotion(on *naming, r *ententev1.PromoteNodeRequest, _ *ententev1.PromoteNodeResponse) {
	on.add("node/", r.GetName())
}

func aboutApproval(on *naming, r *ententev1.ApproveChangeRequest, done *ententev1.ApproveChangeResponse) {
	on.add("change/", r.GetId())
	if done != nil {
		on.add("", done.GetApproval().GetWhat())
	}
}
