package domain

import "fmt"

// Outcome is what a command did. It is the same on every replica, but for Diverged
// and Fatal.
type Outcome struct {
	// Revision of the state after the command, whether it changed something or not.
	Revision uint64
	// Refused says why the command changed nothing; nil if it was carried out.
	Refused *Refusal
	// Changes lists what readers must look at again, each key once, in a fixed order.
	// Several commands of one log entry share their revision.
	Changes []Change
	// Diverged tells that this replica's state differs from the proposer's at the
	// index of a Checksum command. It alone says not which of the two is wrong.
	Diverged bool
	// Checked is the index of a Checksum command that was carried out, 0 otherwise.
	Checked uint64
	// Fatal: the replica cannot go on, for it does not understand what the others
	// carry out. The state is unchanged.
	Fatal error
}

// Refusal is a typed no. It is an error.
type Refusal struct {
	Code   string // one of the Code constants
	Detail string // for people
}

// Error gives code and detail.
func (r *Refusal) Error() string { return r.Code + ": " + r.Detail }

// Why a command was refused.
const (
	CodeInvalid       = "invalid"           // it breaks a rule by itself
	CodeNotInit       = "not-initialised"   // there is no cluster yet
	CodeExists        = "exists"            // something else has that name
	CodeNotFound      = "not-found"         // it speaks of what is not there
	CodeCAS           = "cas"               // the catalogue changed since it was read
	CodeTokenUnknown  = "token-unknown"     // no such token, or pruned
	CodeTokenInvalid  = "token-invalid"     // the statement is not what the token's holder signed
	CodeTokenSpent    = "token-spent"       // it admitted another key
	CodeTokenExpired  = "token-expired"     //
	CodeAgentBanned   = "agent-banned"      //
	CodeMemberExists  = "member-exists"     // name, key or address is taken
	CodeMemberRemoved = "member-removed"    // its key was removed and cannot return
	CodeLastVoter     = "last-voter"        // the cluster would have none
	CodePhase         = "phase"             // the authority's phase does not allow it
	CodeInUse         = "in-use"            // somebody still rests on it
	CodeNotReady      = "not-ready"         // the ready gate was not passed (I3)
	CodeSequence      = "sequence-back"     // a bundle's sequence would go back (I8)
	CodeConflict      = "sequence-conflict" // another bundle has that sequence
	CodeLimit         = "limit"             // there are too many
	CodeForbidden     = "forbidden"         // the administrator's roles do not allow it
	CodeFeature       = "feature-level"     // a member's software does not know it
	CodeApproval      = "approval"          // it needs the operators of a majority of the voters
)

func refuse(code, format string, args ...any) *Refusal {
	return &Refusal{Code: code, Detail: fmt.Sprintf(format, args...)}
}

// ChangeKind says what changed.
type ChangeKind string

// What can change, and the key that a Change names it by.
const (
	ChangeCluster       ChangeKind = "cluster"        // ""
	ChangeMembers       ChangeKind = "members"        // member id
	ChangeAuthority     ChangeKind = "authority"      // authority id
	ChangeOwnBundle     ChangeKind = "own-bundle"     // ""
	ChangeAgent         ChangeKind = "agent"          // agent name
	ChangeEntry         ChangeKind = "entry"          // entry id
	ChangeObject        ChangeKind = "object"         // Kind/name
	ChangeForeignBundle ChangeKind = "foreign-bundle" // trust domain
	ChangeDistrust      ChangeKind = "distrust"       // item id
)

// Change names one thing that was made, altered or removed.
type Change struct {
	Kind ChangeKind
	Key  string
	// Hosts, of an entry only: the agents that could hold it before or may now, sorted.
	Hosts []string
}
