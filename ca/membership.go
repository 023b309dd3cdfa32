package ca

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// MinApprovingVoters is from how many voters on a change of the CA nodes needs the
// operators of a majority of them. Two cannot tell which of them lies.
const MinApprovingVoters = 3

// MembersHash stands for a list of members, in any order: who they are and who votes.
func MembersHash(members []*statev1.Member) [sha256.Size]byte {
	members = slices.SortedFunc(slices.Values(members), func(a, b *statev1.Member) int { return cmp.Compare(a.GetId(), b.GetId()) })
	b := []byte("entente members 1\x00")
	for _, m := range members {
		b = append(appendField(b, []byte(m.GetId())), boolByte(m.GetVoter()))
	}
	return sha256.Sum256(b)
}

func boolByte(yes bool) byte {
	if yes {
		return 1
	}
	return 0
}

// ApprovalStatement is what a CA node's key signs when its operator approves a change of
// the CA nodes: bound to the cluster, its epoch, and the members that it changes, so that
// an approval means nothing elsewhere or later.
func ApprovalStatement(cluster *statev1.Cluster, members [sha256.Size]byte, change []byte) [sha256.Size]byte {
	b := []byte("entente approval 1\x00")
	b = appendField(b, cluster.GetId())
	b = appendField(b, []byte(cluster.GetTrustDomain()))
	b = binary.BigEndian.AppendUint32(b, cluster.GetEpoch())
	b = appendField(b, RecoveryID(cluster))
	b = append(b, members[:]...)
	return sha256.Sum256(appendField(b, change))
}

// VerifyApproval returns the id of the CA node whose key signed the approval.
func VerifyApproval(statement [sha256.Size]byte, nodeKey, signature []byte) (memberID string, err error) {
	key, err := nodePublicKey(nodeKey)
	if err != nil {
		return "", err
	}
	if len(signature) != signatureSize {
		return "", errors.New("the approval has no signature of a node key")
	}
	id := KeyID(nodeKey)
	if !verifyFixed(key, statement, signature) {
		return "", fmt.Errorf("CA node %.12s has not signed this change for these members: read it again and repeat", id)
	}
	return id, nil
}
